"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = !matchMedia("(hover: hover)").matches;
  let printing = false;

  // A colour by name, such as c0, ink or c0/0.2, in the palette of the page as it is shown now.
  function colour(name) {
    const match = /^(c[0-7]|ink|muted)(?:\/([\d.]+))?$/.exec(name);
    if (!match) return name;
    const hex = getComputedStyle(document.documentElement).getPropertyValue("--" + match[1]).trim();
    if (!match[2]) return hex;
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${match[2]})`;
  }

  function coloured(value, key) {
    if (typeof value === "string") return /color$/.test(key) ? colour(value) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((item) => coloured(item, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, name)]));
  }

  function axis(given, narrow) {
    const grid = getComputedStyle(document.documentElement).getPropertyValue("--grid").trim();
    const title = given && given.title ? { ...given.title, standoff: 8 } : undefined;
    const ticks = narrow ? { nticks: 5 } : {};
    return { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, fixedrange: touch, exponentformat: "power",
      ...ticks, ...given, title };
  }

  function legendOf(traces) {
    const named = traces.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap");
    return named.length > 1;
  }

  function draw(place, figure) {
    const narrow = place.clientWidth < 520;
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--ink").trim(), panel = css.getPropertyValue("--panel").trim();
    const traces = coloured(figure.data, "data");
    const given = coloured(figure.layout, "layout");
    const layout = {
      ...given,
      font: { family: "system-ui, sans-serif", size: 12.5, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 44, r: 14, t: 10, b: 44 },
      height: figure.height + (legendOf(traces) ? (narrow ? 13 * traces.length : 24) : 0),
      dragmode: touch ? false : "zoom",
      hoverlabel: { bgcolor: panel, bordercolor: css.getPropertyValue("--rule").trim(), font: { color: ink, size: 12.5 }, align: "left", namelength: narrow ? 18 : 40 },
      showlegend: legendOf(traces),
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 }, traceorder: "normal" },
      xaxis: { ...axis(given.xaxis, narrow), exponentformat: "none", separatethousands: true }, yaxis: axis(given.yaxis, false),
      hovermode: given.hovermode || "closest",
      hoverdistance: given.hovermode === "x unified" ? -1 : 20,
    };
    place.style.height = layout.height + "px";
    Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: touch || printing ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
  }

  let chosen = "";
  function drawAny() {
    const place = document.getElementById("any");
    if (!place || !chosen) return;
    const traces = data.columns.filter((run) => chosen in run.series).map((run, index) => ({
      x: run.x, y: run.series[chosen], name: run.name, type: "scatter", mode: "lines+markers", connectgaps: true,
      line: { color: "c" + index % 7, width: 2 }, marker: { color: "c" + index % 7, size: 4 } }));
    draw(place, { data: traces, height: 320, layout: { xaxis: { title: { text: data.axis } }, yaxis: {}, hovermode: "x unified" } });
  }

  function choose(name) {
    chosen = name;
    document.getElementById("any-title").textContent = name;
    document.getElementById("any-note").textContent = data.metrics[name];
    for (const row of document.querySelectorAll("[data-metric]")) row.classList.toggle("chosen", row.dataset.metric === name);
    drawAny();
  }

  function drawAll() {
    for (const place of document.querySelectorAll("[data-figure]")) draw(place, data.figures[place.dataset.figure]);
    drawAny();
  }

  for (const row of document.querySelectorAll("[data-metric]"))
    row.querySelector("button").addEventListener("click", () => {
      choose(row.dataset.metric);
      document.getElementById("chart-any").scrollIntoView({ block: "nearest" });
    });
  const search = document.getElementById("search");
  if (search) search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const row of document.querySelectorAll("[data-metric]")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      found += !row.hidden;
    }
    document.getElementById("no-match").hidden = found > 0;
  });

  // Some browsers do not play a film out of the page's own text; all play one out of memory.
  for (const film of document.querySelectorAll("video[src^='data:']")) {
    const bytes = Uint8Array.from(atob(film.src.slice(film.src.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
    film.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  }

  // One button and one slider for the films of a seed; the shorter one waits at its end.
  for (const takes of document.querySelectorAll(".takes")) {
    const films = [...takes.querySelectorAll("video")];
    const button = document.createElement("button"), slider = document.createElement("input"), bar = document.createElement("div");
    button.type = "button";
    slider.type = "range"; slider.min = 0; slider.max = 1000; slider.value = 0; slider.setAttribute("aria-label", "time");
    bar.className = "player"; bar.append(button, slider); takes.after(bar);
    const length = () => Math.max(...films.map((film) => film.duration || 0));
    const playing = () => films.some((film) => !film.paused && !film.ended);
    const show = () => { button.textContent = playing() ? "pause" : "play"; };
    const toggle = () => {
      if (playing()) return films.forEach((film) => film.pause());
      if (films.every((film) => film.ended)) films.forEach((film) => { film.currentTime = 0; });
      films.forEach((film) => { if (!film.ended) film.play(); });
    };
    button.addEventListener("click", toggle);
    slider.addEventListener("input", () => films.forEach((film) => {
      film.pause();
      film.currentTime = Math.min(slider.value / 1000 * length(), film.duration || 0);
    }));
    for (const film of films) {
      film.controls = false;
      film.addEventListener("click", toggle);
      for (const name of ["play", "pause", "ended"]) film.addEventListener(name, show);
      film.addEventListener("timeupdate", () => {
        if (playing()) slider.value = 1000 * Math.max(...films.map((each) => each.currentTime)) / (length() || 1);
      });
    }
    show();
  }

  dark.addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", (event) => { printing = event.matches; drawAll(); });
  const first = document.querySelector("[data-metric]");
  if (first) choose(("rollout/return_mean" in data.metrics) ? "rollout/return_mean" : first.dataset.metric);
  drawAll();
  document.documentElement.dataset.drawn = "yes";
})();
