// The Gaussian world in the page: the same curves as bdpo/gaussian.py, redrawn while a slider moves.
(() => {
  "use strict";

  const RESPONSES = Array.from({ length: 100 }, (_, y) => y);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const dot = (a, b) => sum(a.map((x, k) => x * b[k]));
  const sigmoid = (x) => 0.5 * (1 + Math.tanh(x / 2));

  // curves({mu_p, mu_q, sigma_p, sigma_q, sampling, reference}): arrays over the responses 0 to 99
  function curves({ mu_p, mu_q, sigma_p, sigma_q, sampling = "uniform", reference = "none" }) {
    const bad = (name, value, wanted) => {
      throw new RangeError(`${name} is ${value}; it must be ${wanted}`);
    };
    for (const [name, value] of Object.entries({ mu_p, mu_q, sigma_p, sigma_q }))
      if (!Number.isFinite(value)) bad(name, value, "a finite number");
    for (const [name, value] of Object.entries({ sigma_p, sigma_q }))
      if (value <= 0) bad(name, value, "above 0");
    if (!["uniform", "shiftless"].includes(sampling)) bad("sampling", sampling, "'uniform' or 'shiftless'");
    if (!["none", "policy"].includes(reference)) bad("reference", reference, "'none' or 'policy'");

    const logarithm = (mu, sigma) => RESPONSES.map((y) => -((y - mu) ** 2) / (2 * sigma ** 2));
    const normalised = (logs) => {
      const top = Math.max(...logs);
      const bumps = logs.map((l) => Math.exp(l - top));
      const total = sum(bumps);
      return bumps.map((b) => b / total);
    };
    const [logP, logU] = [logarithm(mu_p, sigma_p), logarithm(mu_q, sigma_q)];
    const [p, q] = [normalised(logP), normalised(logU)];
    const kappa = reference === "none" ? (i, j) => sigmoid(logP[i] - logP[j]) : () => 0.5;
    const rho = sampling === "uniform" ? () => 1 : (i, j) => p[i] * p[j];
    const w = RESPONSES.map((i) => sum(RESPONSES.map((j) => rho(i, j) * (sigmoid(logU[i] - logU[j]) - kappa(i, j)))));
    const centre = dot(p, w);
    const pull = p.map((x, k) => x * (w[k] - centre));
    const squares = p.map((x) => x * x);
    const [drift, eq14Drift] = [dot(p, pull), dot(squares, w)];
    return {
      y: [...RESPONSES],
      p,
      q,
      w,
      wp: p.map((x, k) => x * w[k]),
      dpo: pull,
      balanced: p.map((x, k) => x * (pull[k] - drift)),
      eq14: p.map((x, k) => x * (x * w[k] - eq14Drift)),
    };
  }

  window.bdpoGaussian = { curves };

  // ------------------------------------------------------------------------------------------------ the figure

  const STYLE = `
    .gaussian-explorer { color: var(--pst-color-text-base, CanvasText); }
    .gaussian-explorer fieldset { border: 0; margin: 0.6rem 0; padding: 0; }
    .gaussian-explorer .knobs {
      display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.4rem 1.6rem;
    }
    .gaussian-explorer .knobs label {
      display: grid; grid-template-columns: 1fr auto; gap: 0 0.6rem; align-content: start; font-size: 0.92rem;
    }
    .gaussian-explorer .knobs :is(input, select) {
      grid-column: 1 / -1; width: 100%; color: inherit; accent-color: #0697e0;
    }
    .gaussian-explorer select {
      padding: 0.2rem; border: 1px solid currentColor; border-radius: 4px;
      background: var(--pst-color-background, Canvas);
    }
    .gaussian-explorer .value { font-variant-numeric: tabular-nums; }
    .gaussian-explorer .presets {
      display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: center; font-size: 0.92rem;
    }
    .gaussian-explorer button {
      color: inherit; background: none; border: 1px solid currentColor; border-radius: 1rem; padding: 0.1rem 0.8rem;
    }
    .gaussian-explorer button[aria-pressed="true"] { box-shadow: inset 0 0 0 1px currentColor; font-weight: 600; }
    .gaussian-explorer p { margin: 0.6rem 0 0; font-size: 0.92rem; }
    .gaussian-explorer svg { display: block; width: 100%; height: auto; color: inherit; }
    .gaussian-explorer svg text { fill: currentColor; font-size: 13px; }
    @media (width < 600px) { .gaussian-explorer svg text { font-size: 19px; } }
    .gaussian-explorer .numbers { overflow-x: auto; margin-top: 0.6rem; }
    .gaussian-explorer table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
    .gaussian-explorer :is(th, td) {
      padding: 0.15rem 0.5rem; border-bottom: 1px solid var(--book-rule, currentColor);
      color: inherit; text-align: right; font-variant-numeric: tabular-nums;
    }
    .gaussian-explorer :is(th, td):first-child { text-align: left; }
  `;

  const LINES = {
    w: { words: "w", stroke: "#0697e0", dash: "" },
    wp: { words: "w π", stroke: "#e57300", dash: "12 3" },
    dpo: { words: "DPO’s update", stroke: "#0697e0", dash: "" },
    balanced: { words: "balanced update", stroke: "#e57300", dash: "12 3" },
  };
  const PLOTS = [
    ["The curves of Figure 1, each divided by its largest size", ["w", "wp"]],
    ["The first-order updates of the probabilities, likewise", ["dpo", "balanced"]],
  ];
  const SLIDERS = {
    mu_p: ["μP, mode of the policy", 0, 99, 45],
    mu_q: ["μQ, mode of the utility", 0, 99, 55],
    sigma_p: ["σP, width of the policy", 1, 40, 10],
    sigma_q: ["σQ, width of the utility", 1, 40, 10],
  };
  const CHOICES = {
    sampling: ["Sampling of pairs", { uniform: "uniform", shiftless: "from the policy (shiftless)" }],
    reference: ["Reference policy", { none: "uniform, as in Section 4.3", policy: "the policy (start of DPO)" }],
  };
  const PANELS = {};
  for (const [panel, mu_p, mu_q, sampling] of [
    ["a", 45, 55, "uniform"], ["b", 45, 55, "shiftless"],
    ["c", 30, 70, "uniform"], ["d", 30, 70, "shiftless"],
    ["e", 48, 52, "uniform"], ["f", 48, 52, "shiftless"],
  ])
    PANELS[panel] = { mu_p, mu_q, sigma_p: 10, sigma_q: 10, sampling, reference: "none" };

  const [WIDTH, HEIGHT, LEFT, TOP, BOTTOM] = [640, 236, 34, 26, 42];
  const atX = (y) => LEFT + (y / 99) * (WIDTH - LEFT - 8);
  const atY = (v) => TOP + ((1 - v) / 2) * (HEIGHT - TOP - BOTTOM);
  const largest = (values) => Math.max(...values.map(Math.abs)) || 1;

  function element(tag, attributes = {}, ...children) {
    const made = tag.startsWith("svg:")
      ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function summary(found, { mu_p, sigma_p }) {
    return Object.keys(LINES).map((name) => {
      const values = found[name];
      const size = values.map(Math.abs);
      const far = sum(size.filter((_, y) => Math.abs(y - mu_p) > 3 * sigma_p)) / (sum(size) || 1);
      const at = (extreme) => values.indexOf(extreme(...values));
      return { name, lowest: at(Math.min), highest: at(Math.max), far };
    });
  }

  function plot(title, names, found, params) {
    const words = summary(found, params)
      .filter(({ name }) => names.includes(name))
      .map(({ name, lowest, highest }) => `${LINES[name].words}: lowest at ${lowest}, highest at ${highest}`);
    const svg = element("svg:svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}. ${words.join("; ")}.`,
    });
    for (const [mode, mu, sigma, fill] of [
      ["P", params.mu_p, params.sigma_p, "#00995c"],
      ["Q", params.mu_q, params.sigma_q, "#b234a5"],
    ]) {
      const [low, high] = [Math.max(mu - sigma, 0), Math.min(mu + sigma, 99)].map(atX);
      const band = { x: low, y: TOP, width: high - low, height: HEIGHT - TOP - BOTTOM };
      const middle = { x1: atX(mu), x2: atX(mu), y1: TOP, y2: HEIGHT - BOTTOM };
      svg.append(element("svg:rect", { ...band, fill, opacity: 0.16 }));
      svg.append(element("svg:line", { ...middle, stroke: fill, "stroke-dasharray": "2 3" }));
      svg.append(element("svg:text", { x: atX(mu), y: TOP - 6, "text-anchor": "middle" }, mode));
    }
    for (const v of [-1, 0, 1]) {
      const level = { x1: LEFT, x2: atX(99), y1: atY(v), y2: atY(v) };
      svg.append(element("svg:line", { ...level, stroke: "currentColor", opacity: v ? 0.2 : 0.7 }));
      svg.append(element("svg:text", { x: LEFT - 6, y: atY(v) + 4, "text-anchor": "end" }, `${v}`.replace("-", "−")));
    }
    for (const y of [0, 20, 40, 60, 80, 99])
      svg.append(element("svg:text", { x: atX(y), y: HEIGHT - 24, "text-anchor": "middle" }, String(y)));
    svg.append(element("svg:text", { x: atX(99), y: HEIGHT - 6, "text-anchor": "end" }, "response y"));
    names.forEach((name, k) => {
      const { words, stroke, dash } = LINES[name];
      const scale = largest(found[name]);
      const points = found[name].map((v, y) => `${atX(y).toFixed(1)},${atY(v / scale).toFixed(1)}`).join(" ");
      const look = { fill: "none", stroke, "stroke-width": 2.2, "stroke-dasharray": dash };
      svg.append(element("svg:polyline", { points, ...look, "data-curve": name }));
      const x = LEFT + 190 * k;
      svg.append(element("svg:line", { x1: x, x2: x + 34, y1: HEIGHT - 10, y2: HEIGHT - 10, ...look }));
      svg.append(element("svg:text", { x: x + 40, y: HEIGHT - 6 }, words));
    });
    return [element("p", {}, title), svg];
  }

  function table(found, params) {
    const head = ["curve", "lowest at", "highest at", "share beyond 3σ of P"];
    const percent = (x) => `${Number((100 * x).toPrecision(2))} %`;
    const row = ({ name, lowest, highest, far }) => [LINES[name].words, lowest, highest, percent(far)];
    const cell = (text, k) => (k ? element("td", {}, String(text)) : element("th", { scope: "row" }, text));
    const lines = summary(found, params).map((line) => element("tr", {}, ...row(line).map(cell)));
    const titles = element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)));
    return element("table", {}, element("thead", {}, titles), element("tbody", {}, ...lines));
  }

  function explore(root) {
    const knobs = {};
    const legend = element("legend", { class: "visually-hidden" }, "The world");
    const fields = element("fieldset", { class: "knobs" }, legend);
    for (const [name, [words, min, max, value]] of Object.entries(SLIDERS)) {
      knobs[name] = element("input", { type: "range", name, min, max, step: 0.5, value });
      fields.append(element("label", {}, words, element("span", { class: "value" }), knobs[name]));
    }
    for (const [name, [words, options]] of Object.entries(CHOICES)) {
      const listed = Object.entries(options).map(([value, text]) => element("option", { value }, text));
      knobs[name] = element("select", { name }, ...listed);
      fields.append(element("label", {}, words, knobs[name]));
    }
    const group = { class: "presets", role: "group", "aria-label": "Panels of Figure 1" };
    const presets = element("div", group, "Panels of Figure 1:");
    for (const [panel, world] of Object.entries(PANELS)) {
      const button = element("button", { type: "button", "data-panel": panel }, panel);
      button.addEventListener("click", () => {
        for (const [name, value] of Object.entries(world)) knobs[name].value = value;
        redraw();
      });
      presets.append(button);
    }
    const picture = element("div");
    const region = { class: "numbers", tabindex: 0, role: "region", "aria-label": "Numbers of the four curves" };
    const numbers = element("div", region);

    function redraw() {
      const params = {};
      for (const [name, knob] of Object.entries(knobs)) {
        params[name] = name in SLIDERS ? Number(knob.value) : knob.value;
        if (name in SLIDERS) knob.parentElement.querySelector(".value").textContent = knob.value;
      }
      for (const button of presets.querySelectorAll("button")) {
        const world = Object.entries(PANELS[button.dataset.panel]);
        button.setAttribute("aria-pressed", world.every(([name, value]) => params[name] === value));
      }
      const found = curves(params);
      picture.replaceChildren(...PLOTS.flatMap(([title, names]) => plot(title, names, found, params)));
      numbers.replaceChildren(table(found, params));
    }

    fields.addEventListener("input", redraw);
    root.classList.add("gaussian-explorer");
    root.replaceChildren(element("style", {}, STYLE), presets, fields, picture, numbers);
    redraw();
  }

  const start = () => document.querySelectorAll("[data-gaussian-explorer]").forEach(explore);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
