"use strict";
// Draws the plots from the data block in the page. The tables hold the same figures and need no script.
(function () {
  const data = JSON.parse(document.getElementById("sparing-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const symbols = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star", "hexagon"];
  const dashes = ["solid", "dash", "dot", "dashdot"];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const series = (i) => colour("--plot-" + (i % 8));
  // Plotly reads a little markup in text; names come from users and are shown as they are.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function axis(title, extra) {
    return Object.assign({
      title: { text: plain(title), font: { size: 13 }, standoff: 12 }, gridcolor: colour("--rule"), linecolor: colour("--rule"),
      zeroline: false, ticks: "outside", tickcolor: colour("--rule"), automargin: true, nticks: narrow.matches ? 4 : 8,
    }, extra);
  }

  function layout(x, y, legend) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--ink") },
      margin: { l: 62, r: 18, t: 14, b: 52 }, xaxis: x, yaxis: y, showlegend: legend, hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--rule"), font: { color: colour("--ink") }, align: "left" },
      dragmode: coarse.matches ? false : "zoom",
    };
  }

  const settings = { responsive: true, displaylogo: false, displayModeBar: false };

  // 1, 2, 5, 10, 20 … over the range; Plotly's own labels of a log axis leave the power of ten to be guessed.
  function ticks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.log10(high) + 1; power++) {
      for (const digit of high / low > 300 ? [1] : high / low > 40 || narrow.matches ? [1, 3] : [1, 2, 5]) found.push(digit * 10 ** power);
    }
    return found;
  }

  function front(points, lower, higher) {
    const value = (p) => [lower ? p.x : -p.x, higher ? -p.y : p.y];
    const dominated = (p) => points.some((q) => {
      const [a, b] = value(q), [c, d] = value(p);
      return a <= c && b <= d && (a < c || b < d);
    });
    return points.filter((p) => !dominated(p)).sort((p, q) => p.x - q.x);
  }

  function pareto(element, panel, chosen) {
    const edge = front(chosen.points, chosen.better !== "higher", panel.better !== "lower");
    const xs = chosen.points.map((p) => p.x);
    const wide = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 8;
    const low = Math.min(...xs), high = Math.max(...xs), pad = (high - low) * 0.12 || Math.abs(high) * 0.1 || 1;
    const share = (x) => (wide ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low || 1));
    const traces = [{
      x: edge.map((p) => p.x), y: edge.map((p) => p.y), mode: "lines", name: "not beaten on both", hoverinfo: "skip",
      line: { color: colour("--muted"), width: 1.5, dash: "dot" },
    }];
    // Rows that all but coincide share one label, at the first of them.
    const ys = chosen.points.map((p) => p.y), spread = Math.max(...ys) - Math.min(...ys) || 1;
    const close = (p, q) => Math.abs(share(p.x) - share(q.x)) < 0.04 && Math.abs(p.y - q.y) < 0.04 * spread;
    const heads = panel.rows.map((_, i) => chosen.points.find((p) => p.row === i));
    const labels = heads.map((p, i) => {
      if (!p || heads.slice(0, i).some((q) => q && close(p, q))) return "";
      return panel.rows.filter((_, j) => heads[j] && (j === i || (j > i && close(p, heads[j])))).join(", ");
    });
    panel.rows.forEach((name, i) => {
      const points = chosen.points.filter((p) => p.row === i);
      if (!points.length) return;
      traces.push({
        x: points.map((p) => p.x), y: points.map((p) => p.y), mode: "markers+text", name: plain(name),
        text: points.map((p, j) => (j === 0 && labels[i] ? "  " + plain(labels[i]) + "  " : "")), textposition: points.map((p) => (share(p.x) > 0.7 ? "middle left" : "middle right")), cliponaxis: false,
        hovertext: points.map((p) => p.text.map(plain).join("<br>")), hoverinfo: "text",
        marker: {
          size: 12, color: series(i), symbol: points.map((p) => symbols[p.seed % symbols.length]),
          line: { width: 1.5, color: colour("--raised") },
        },
        error_y: {
          type: "data", symmetric: false, array: points.map((p) => (p.high === null ? 0 : p.high - p.y)),
          arrayminus: points.map((p) => (p.low === null ? 0 : p.y - p.low)), color: series(i), thickness: 1, width: 4,
        },
      });
    });
    const range = wide ? [Math.log10(low) - 0.15, Math.log10(high) + 0.15] : [low - pad, high + pad];
    Plotly.react(element, traces, layout(
      axis(chosen.label + (wide ? ", log scale" : ""), Object.assign(
        { type: wide ? "log" : "linear", range, tickformat: high >= 1e4 ? "~s" : "~g" },
        wide ? { tickmode: "array", tickvals: ticks(low, high) } : {})),
      axis(panel.label, {}), false), settings);
  }

  function curves(element, panel) {
    const traces = panel.series.map((s) => ({
      x: s.x, y: s.y, mode: s.x.length > 1 ? "lines" : "markers", name: plain(s.name),
      line: { color: series(s.row), width: 2, dash: dashes[s.seed % dashes.length] }, marker: { color: series(s.row) },
      hovertemplate: "%{fullData.name}<br>step %{x}: %{y:.4g}<extra></extra>",
    }));
    Plotly.react(element, traces, layout(axis("step", { rangemode: "tozero" }), axis("", {}), panel.series.length > 1), settings);
  }

  function draw() {
    document.querySelectorAll("[data-pareto]").forEach((element) => {
      const panel = data.pareto[Number(element.dataset.pareto)];
      const checked = document.querySelector("input[name='axis-" + element.dataset.pareto + "']:checked");
      pareto(element, panel, panel.axes[checked ? Number(checked.value) : 0]);
    });
    document.querySelectorAll("[data-curves]").forEach((element) => curves(element, data.curves[Number(element.dataset.curves)]));
    document.documentElement.dataset.drawn = "yes";
  }

  document.querySelectorAll(".switch input").forEach((input) => input.addEventListener("change", draw));
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();
})();
