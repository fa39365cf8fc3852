// Layers as a bar, and a handle on every cut. A handle is moved by dragging it, or with the arrow keys; it stops at its
// neighbours, so that every stage keeps a layer. Python has the names, the shares and the words; `cuts` goes both ways.

const make = (parent, kind) => {
  const element = document.createElement("div");
  element.className = kind;
  parent.append(element);
  return element;
};

// The longest of several texts that fits into the element.
const fit = (element, texts) => {
  for (const text of [...texts, ""]) {
    element.textContent = text;
    if (element.scrollWidth <= element.clientWidth) return;
  }
};

function render({ model, el }) {
  const root = make(el, "mplab-cuts");
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab would take the arrow keys
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "where the model is cut");
  const rail = make(root, "rail"), layers = make(root, "layers"), stages = make(root, "stages");
  let handles = [];

  const edges = () => model.get("shares").reduce((all, share) => [...all, all.at(-1) + share], [0]);

  const move = (index, wanted) => {
    const cuts = [...model.get("cuts")];
    const low = (cuts[index - 1] ?? 0) + 1, high = (cuts[index + 1] ?? model.get("names").length) - 1;
    const cut = Math.min(high, Math.max(low, wanted));
    if (cut === cuts[index]) return;
    cuts[index] = cut;
    model.set("cuts", cuts);
    model.save_changes();
  };

  const makeHandle = (index) => {
    const handle = make(rail, "handle");
    handle.tabIndex = 0;
    handle.setAttribute("role", "slider");
    handle.setAttribute("aria-orientation", "horizontal");
    handle.onkeydown = (event) => {
      const cut = model.get("cuts")[index];
      const wanted = {
        ArrowRight: cut + 1, ArrowUp: cut + 1, ArrowLeft: cut - 1, ArrowDown: cut - 1, Home: 0, End: Infinity,
      }[event.key];
      if (wanted === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation();
      move(index, wanted);
    };
    handle.onpointerdown = (event) => {
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      event.preventDefault();
    };
    handle.onpointermove = (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const box = rail.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
      const away = edges().map((edge) => Math.abs(edge - at));
      move(index, away.indexOf(Math.min(...away)));
    };
    return handle;
  };

  const draw = () => {
    const names = model.get("names"), cuts = model.get("cuts"), ranks = model.get("ranks"), at = edges();
    while (handles.length > cuts.length) handles.pop().remove();
    while (handles.length < cuts.length) handles.push(makeHandle(handles.length));
    handles.forEach((handle, index) => {
      const cut = cuts[index];
      handle.style.left = `${100 * at[cut]}%`;
      handle.setAttribute("aria-label", cuts.length > 1 ? `cut ${index + 1} of ${cuts.length}` : "cut");
      handle.setAttribute("aria-valuemin", (cuts[index - 1] ?? 0) + 1);
      handle.setAttribute("aria-valuemax", (cuts[index + 1] ?? names.length) - 1);
      handle.setAttribute("aria-valuenow", cut);
      handle.setAttribute("aria-valuetext", `before ${names[cut]}`);
    });
    const bounds = [0, ...cuts, names.length];
    const fill = (stage) => `rank-${(ranks[stage] ?? 0) % 4}`;
    layers.replaceChildren();
    names.forEach((name, index) => {
      const stage = cuts.filter((cut) => cut <= index).length;
      const layer = make(layers, `layer ${fill(stage)}${cuts.includes(index) ? " first" : ""}`);
      layer.style.left = `${100 * at[index]}%`;
      layer.style.width = `${100 * (at[index + 1] - at[index])}%`;
      layer.title = model.get("hints")[index] ?? name;
      fit(make(layer, "text"), [name, name.split(".").at(-1), `${index}`]);
    });
    stages.replaceChildren();
    bounds.slice(1).forEach((end, stage) => {
      const box = make(stages, `stage ${fill(stage)}`);
      box.style.left = `${100 * at[bounds[stage]]}%`;
      box.style.width = `${100 * (at[end] - at[bounds[stage]])}%`;
      const texts = model.get("labels")[stage] ?? [];
      box.title = texts[0] ?? "";
      fit(make(box, "text"), texts);
    });
  };

  const watcher = new ResizeObserver(draw);
  watcher.observe(root);
  model.on("change", draw);
  draw();
  return () => {
    watcher.disconnect();
    model.off("change", draw);
  };
}

export default { render };
