// What the page does for an explorer, in the box that this widget stands in, unseen. It tells Python how wide the page
// is: a plotly figure alone would be 700 px wide until it is drawn again. And it serves those who work by keyboard or
// hear the page: ipywidgets leaves sliders without a name, and plotly's texts would be read one by one.

const set = (element, name, value) => {
  if (element && value && element.getAttribute(name) !== value) element.setAttribute(name, value);
};

function render({ model, el }) {
  let box = null, left = null; // left: a button that had the focus when it was disabled

  const name = () => {
    for (const slider of box.querySelectorAll(".widget-slider")) {
      const handle = slider.querySelector("[role=slider]");
      set(handle, "aria-label", slider.querySelector(".widget-label")?.textContent);
      set(handle, "aria-valuetext", slider.querySelector(".widget-readout")?.textContent); // not its place in a list
    }
    for (const figure of box.querySelectorAll(".js-plotly-plot")) {
      set(figure, "role", "img");
      set(figure, "aria-label", figure.querySelector(".gtitle")?.textContent);
    }
  };

  // A browser takes the focus from a button that is disabled, and JupyterLab would take the next key for its own.
  const keepFocus = (button) => {
    if (button.disabled && button === document.activeElement) left = button;
    if (button.disabled || button !== left) return;
    if (document.activeElement === document.body) button.focus();
    left = null;
  };

  const changes = new MutationObserver((records) => {
    records.filter((record) => record.attributeName === "disabled").forEach((record) => keepFocus(record.target));
    name();
  });

  const watcher = new ResizeObserver(() => {
    if (!el.clientWidth) return;
    model.set("width_px", el.clientWidth);
    model.save_changes();
    if (box) return;
    box = el.closest(".widget-vbox");
    const attributeFilter = ["disabled", "aria-valuenow", "aria-valuetext"];
    changes.observe(box, { subtree: true, childList: true, characterData: true, attributeFilter });
    name();
  });
  watcher.observe(el);
  return () => {
    watcher.disconnect();
    changes.disconnect();
  };
}

export default { render };
