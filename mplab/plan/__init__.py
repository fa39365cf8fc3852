"""Where to cut, and what it should cost: pure functions, without ranks or devices."""
