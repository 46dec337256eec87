const report = readJSON("report");
const data = readJSON("items");
const { methods, rewards, baseline, images } = data;
const others = range(methods.length).filter((m) => m !== baseline);
const count = data.ids.length;
const prompts = decoded(data.prompts);
const categories = Object.fromEntries(Object.entries(data.categories).map(([column, coded]) => [column, decoded(coded)]));
const scores = data.scores.map(floats); // per reward, [methods, items]
const scoreOf = (reward, method, item) => scores[reward]?.[method * count + item] ?? NaN; // runs may have no reward
const colour = (method) => `--colour: var(--m${method === baseline ? 0 : 1 + (others.indexOf(method) % 7)})`;
const named = (method) => {
  const index = methods.indexOf(method);
  return el("span", { class: "name", title: method, style: colour(index) }, el("i", { class: "dot" }), el("bdi", {}, method));
};
const select = (label, options, value, onchange, name = label) => {
  const box = el("select", { "aria-label": name, change: () => onchange(box.value) }, ...options.map(([key, text]) => new Option(text, key)));
  box.value = value;
  return el("label", {}, label, box);
};

// ---------------------------------------------------------------------------------------------------- tables

// Fills a table whose columns sort it. A column has a `title`, `cells(row)`, and `key(row)` if it sorts.
function table(id, columns, rows, rowClass = () => null) {
  const body = el("tbody");
  const heads = [];
  const draw = (list) => body.replaceChildren(...list.map((row, i) =>
    el("tr", { class: rowClass(row, list[i + 1]) }, ...columns.flatMap((column) => column.cells(row)))));
  const sortBy = (column, head) => {
    const known = (row) => column.key(row) !== null && column.key(row) !== undefined;
    const first = typeof column.key(rows.find(known) ?? rows[0]) === "string" ? "ascending" : "descending";
    const order = head.ariaSort === null ? first : head.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    draw(rows.toSorted((a, b) => {
      if (!known(a) || !known(b)) return known(b) - known(a);
      const [x, y] = [column.key(a), column.key(b)];
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    }));
  };
  for (const column of columns) {
    const head = el("th", { scope: column.span ? "colgroup" : "col", colspan: column.span, class: column.class });
    head.append(column.key ? el("button", { type: "button", click: () => sortBy(column, head) }, column.title) : column.title);
    heads.push(head);
  }
  draw(rows);
  byId(id).replaceChildren(el("thead", {}, el("tr", {}, ...heads)), body);
}

// What every interval of a column is drawn on: common limits, a neutral value, decimals.
function scale(intervals, { neutral = null, percent = false, signed = false } = {}) {
  const known = intervals.filter((interval) => interval && Number.isFinite(interval.value));
  const ends = known.flatMap(({ value, low, high }) => [low ?? value, high ?? value]);
  if (neutral !== null) ends.push(neutral);
  const [from, to] = [Math.min(...ends), Math.max(...ends)];
  const halves = known.map(({ low, high }) => (high - low) / 2).filter((half) => half > 0).sort((a, b) => a - b);
  // As many as show the interval, and no more: half of it is at least three units of the last one.
  const decimals = percent ? 1 : decimalsFor((halves[halves.length >> 1] ?? Math.abs(to) / 100) / 3, 1);
  const factor = percent ? 100 : 1;
  return { from, to: to > from ? to : from + 1, neutral, decimals, show: (value) => number(value === null ? null : value * factor, decimals, signed) };
}

const between = ({ low, high }, { show }) => (low === null || high === null ? "" : `[${show(low)}, ${show(high)}]`);

function whisker({ value, low, high }, { from, to, neutral }, style) {
  const [width, height] = [88, 16];
  const x = (at) => 5 + ((at - from) / (to - from)) * (width - 10);
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", style },
    neutral === null ? null : svg("line", { class: "axis", x1: x(neutral), x2: x(neutral), y1: 0, y2: height }),
    low === null || high === null ? null : svg("line", { class: "whisker", x1: x(low), x2: x(high), y1: height / 2, y2: height / 2 }),
    svg("circle", { class: "point", cx: x(value), cy: height / 2, r: 3 }));
}

// The three cells of an interval: number, range, drawing.
function intervalCells(interval, limits, method, best = false) {
  if (!interval || interval.value === null) return [el("td", { class: "value note" }, "–"), el("td", { class: "range" }), el("td", { class: "plot" })];
  return [
    el("td", { class: best ? "value best" : "value" }, limits.show(interval.value)),
    el("td", { class: "range" }, between(interval, limits)),
    el("td", { class: "plot" }, whisker(interval, limits, colour(methods.indexOf(method)))),
  ];
}

const probability = (p) => (p === null || p === undefined ? "–" : p < 0.0001 ? "< 0.0001" : number(p, p < 0.01 ? 4 : p < 0.1 ? 3 : 2));
const methodColumn = { title: "Method", key: (row) => row.method, cells: (row) => [el("th", { scope: "row" }, named(row.method))] };

function showResults() {
  const rows = rewards.flatMap((reward) => methods.flatMap((method) =>
    report.overall.filter((row) => row.reward === reward && row.method === method)));
  const measures = ["mean", "win_rate", "gain"];
  const limits = { win_rate: scale(rows.map((row) => row.win_rate), { neutral: 0.5, percent: true }) };
  const best = {};
  for (const reward of rewards) {
    const own = rows.filter((row) => row.reward === reward);
    limits[reward] = { ...limits, mean: scale(own.map((row) => row.mean)), gain: scale(own.map((row) => row.gain), { neutral: 0, signed: true }) };
    best[reward] = Object.fromEntries(measures.map((measure) =>
      [measure, Math.max(...own.map((row) => row[measure]?.value ?? -Infinity))]));
  }
  const measure = (name, title) => ({
    title, span: 3, key: (row) => row[name]?.value ?? null,
    cells: (row) => intervalCells(row[name], limits[row.reward][name], row.method, row[name]?.value === best[row.reward][name]),
  });
  table("results-table", [
    methodColumn,
    { title: "Reward", key: (row) => row.reward, cells: (row) => [el("td", {}, el("bdi", {}, row.reward))] },
    measure("win_rate", "Win rate, %"),
    {
      title: "p", class: "right", key: (row) => row.sign_test?.p_corrected ?? null,
      cells: ({ sign_test: test }) => [el("td", {
        class: "right", title: test && `${number(test.wins)} wins, ${number(test.losses)} losses, ${number(test.ties)} ties; p before correction ${probability(test.p)}`,
      }, test ? probability(test.p_corrected) : "–")],
    },
    measure("gain", "Gain"),
    measure("mean", "Mean"),
    { title: "Images", class: "right", key: (row) => row.images, cells: (row) => [el("td", { class: "right" }, number(row.images))] },
  ], rows, (row, next) => (next && next.reward !== row.reward ? "group" : null));
}

function showFair() {
  const rows = rewards.flatMap((reward) => report.methods.map((method) => ({ reward, method: method.name, cost: method.cost })));
  const gainOver = (row, control) => (control === null
    ? report.overall.find((own) => own.reward === row.reward && own.method === row.method)
    : report.controls.find((own) => own.reward === row.reward && own.method === row.method && own.control === control))?.gain ?? null;
  const over = [null, ...report.control_runs];
  const limits = Object.fromEntries(rewards.map((reward) => [reward, scale(
    rows.filter((row) => row.reward === reward).flatMap((row) => over.map((control) => gainOver(row, control))), { neutral: 0, signed: true })]));
  const cost = (name, title, show) => ({ title, class: "right", key: (row) => row.cost?.[name] ?? null,
    cells: (row) => [el("td", { class: "right" }, row.cost?.[name] ? show(row.cost[name]) : "–")] });
  table("fair-table", [
    methodColumn,
    { title: "Reward", key: (row) => row.reward, cells: (row) => [el("td", {}, el("bdi", {}, row.reward))] },
    cost("predictions", "Predictions", (value) => number(value)),
    cost("seconds", "Seconds", (value) => number(value, decimalsFor(value, 2))),
    ...over.map((control) => ({
      title: `Over ${control ?? report.baseline}`, span: 3, key: (row) => gainOver(row, control)?.value ?? null,
      cells: (row) => intervalCells(gainOver(row, control), limits[row.reward], row.method),
    })),
  ], rows, (row, next) => (next && next.reward !== row.reward ? "group" : null));
}

function showLooks() {
  const rows = report.looks;
  const limits = (name, options) => Object.fromEntries([...new Set(rows.map((row) => row.reward))].map((look) =>
    [look, scale(rows.filter((row) => row.reward === look).map((row) => row[name]), options)]));
  const [means, gains] = [limits("mean"), limits("gain", { neutral: 0, signed: true })];
  table("looks-table", [
    methodColumn,
    { title: "Measure", key: (row) => row.reward, cells: (row) => [el("td", {}, row.reward)] },
    { title: "Mean", span: 3, key: (row) => row.mean?.value ?? null, cells: (row) => intervalCells(row.mean, means[row.reward], row.method) },
    { title: "Difference", span: 3, key: (row) => row.gain?.value ?? null, cells: (row) => intervalCells(row.gain, gains[row.reward], row.method) },
  ], rows, (row, next) => (next && next.reward !== row.reward ? "group" : null));
}

function showCategories() {
  const rows = report.categories;
  const columns = [...new Set(rows.map((row) => row.column))];
  const chosen = { column: columns[0], reward: rewards[0], measure: "win_rate" };
  const draw = () => {
    const cells = rows.filter((row) => row.column === chosen.column && row.reward === chosen.reward);
    const shown = methods.filter((method) => chosen.measure === "mean" || method !== report.baseline);
    const of = (value, method) => cells.find((row) => row.value === value && row.method === method)?.[chosen.measure] ?? null;
    const neutral = { win_rate: 0.5, gain: 0, mean: null }[chosen.measure];
    const limits = scale(cells.map((row) => row[chosen.measure]), { neutral, percent: chosen.measure === "win_rate", signed: chosen.measure === "gain" });
    const most = Math.max(limits.to - neutral, neutral - limits.from);
    const tone = (interval) => {
      if (neutral === null || interval.low === null || (interval.low <= neutral && interval.high >= neutral)) return null;
      const away = interval.value - neutral;
      return `--tone: var(--${away > 0 ? "better" : "worse"}); --share: ${Math.round(10 + (30 * Math.abs(away)) / most)}%`;
    };
    const values = [...new Map(cells.map((row) => [row.value, row.prompts]))].map(([value, prompts]) => ({ value, prompts }));
    table("category-table", [
      { title: chosen.column, key: (row) => row.value, cells: (row) => [el("th", { scope: "row" }, el("bdi", {}, row.value || "(none)"))] },
      { title: "Prompts", class: "right", key: (row) => row.prompts, cells: (row) => [el("td", { class: "right" }, number(row.prompts))] },
      ...shown.map((method) => ({
        title: method, class: "right", key: (row) => of(row.value, method)?.value ?? null,
        cells: (row) => {
          const interval = of(row.value, method);
          if (!interval || interval.value === null) return [el("td", { class: "cell note" }, "–")];
          return [el("td", { class: "cell", style: tone(interval) }, limits.show(interval.value), el("span", { class: "range" }, between(interval, limits)))];
        },
      })),
    ], values);
    byId("category-note").replaceChildren(...(neutral === null ? ["Scores of different prompts are not comparable: compare within a row."] : [
      "Coloured where the interval excludes ", neutral ? "50 %" : "0", ": ", el("i", { class: "swatch", style: "background: var(--better)" }), "better, ",
      el("i", { class: "swatch", style: "background: var(--worse)" }), `worse than ${report.baseline}.`]));
  };
  const choose = (name) => (value) => { chosen[name] = value; draw(); };
  byId("category-controls").append(
    select("Column", columns.map((name) => [name, name]), chosen.column, choose("column")),
    select("Reward", rewards.map((name) => [name, name]), chosen.reward, choose("reward")),
    select("Show", [["win_rate", "Win rate, %"], ["gain", "Gain"], ["mean", "Mean"]], chosen.measure, choose("measure")));
  draw();
}

function showBenchmarks() {
  const rows = report.benchmarks;
  const score = scale(rows.map((row) => row.score));
  const difference = scale(rows.map((row) => row.difference), { neutral: 0, signed: true });
  const text = (title, name) => ({ title, key: (row) => row[name], cells: (row) => [el("td", {}, el("bdi", {}, row[name]))] });
  table("benchmarks-table", [
    methodColumn, text("Benchmark", "benchmark"), text("Category", "measure"),
    { title: "Score", span: 3, key: (row) => row.score?.value ?? null, cells: (row) => intervalCells(row.score, score, row.method) },
    { title: "Difference", span: 3, key: (row) => row.difference?.value ?? null, cells: (row) => intervalCells(row.difference, difference, row.method) },
    { title: "Prompts", class: "right", key: (row) => row.prompts, cells: (row) => [el("td", { class: "right" }, number(row.prompts))] },
  ], rows, (row, next) => (next && next.measure !== row.measure ? "group" : null));
}

const textColumn = (title, name) => ({ title, key: (row) => row[name], cells: (row) => [el("td", {}, row[name])] });

// Cells of an interval, each drawn to the scale of the rows with the same features and measure.
function measuredColumn(title, rows, name, options) {
  const kind = (row) => `${row.features} ${row.measure}`;
  const limits = Object.fromEntries([...new Set(rows.map(kind))].map((one) =>
    [one, scale(rows.filter((row) => kind(row) === one).map((row) => row[name]), options)]));
  return { title, span: 3, key: (row) => row[name]?.value ?? null, cells: (row) => intervalCells(row[name], limits[kind(row)], row.method) };
}

const countColumn = (title, name) => ({ title, class: "right", key: (row) => row[name], cells: (row) => [el("td", { class: "right" }, row[name] === null ? "–" : number(row[name]))] });

function showDiversity() {
  const rows = report.diversity;
  table("diversity-table", [
    methodColumn, textColumn("Features", "features"), textColumn("Measure", "measure"),
    measuredColumn("Value", rows, "value"),
    measuredColumn("Difference", rows, "difference", { neutral: 0, signed: true }),
    countColumn("Prompts", "prompts"),
  ], rows);
}

function showSets() {
  const rows = report.sets;
  table("sets-table", [
    methodColumn, textColumn("Features", "features"), textColumn("Measure", "measure"),
    measuredColumn("Value", rows, "value"),
    countColumn("Images", "images"), countColumn("Reference", "reference_images"),
  ], rows);
}

function showVotes() {
  const rows = report.votes;
  const limits = scale(rows.map((row) => row.win_rate), { neutral: 0.5, percent: true });
  const counted = (name) => ({ title: name[0].toUpperCase() + name.slice(1), class: "right", key: (row) => row[name], cells: (row) => [el("td", { class: "right" }, number(row[name]))] });
  table("votes-table", [
    methodColumn, counted("votes"),
    { title: "Win rate, %", span: 3, key: (row) => row.win_rate?.value ?? null, cells: (row) => intervalCells(row.win_rate, limits, row.method) },
    counted("wins"), counted("losses"), counted("ties"),
    { title: "p", class: "right", key: (row) => row.p, cells: (row) => [el("td", { class: "right" }, probability(row.p))] },
  ], rows);
}

function showMethods() {
  const counted = (name, title) => ({ title, class: "right", key: (row) => row[name], cells: (row) => [el("td", { class: "right" }, number(row[name]))] });
  table("methods-table", [
    { title: "Method", key: (row) => row.name, cells: (row) => [el("th", { scope: "row" }, named(row.name))] },
    { title: "w", class: "right", key: (row) => row.w, cells: (row) => [el("td", { class: "right" }, row.w === null ? "–" : String(row.w))] },
    counted("images", "Images"), counted("missing", "Missing"), counted("changed", "Changed"),
    counted("unreadable", "Unreadable"), counted("left_out", "Left out"),
  ], report.methods);
  const bad = report.overall.filter((row) => row.not_finite > 0);
  byId("not-finite").textContent = bad.length === 0 ? "" :
    `Scores that are no finite numbers, left out of every average: ${bad.map((row) => `${row.method}, ${row.reward}: ${number(row.not_finite)}`).join("; ")}.`;
  byId("settings").append(...report.methods.map((method) => {
    const entries = Object.entries(method.settings);
    return el("details", {},
      el("summary", {}, named(method.name), el("span", { class: "note" }, `  ${entries.length} settings`)),
      el("dl", {}, el("dt", {}, "folder"), el("dd", {}, method.folder), ...entries.flatMap(([name, value]) =>
        [el("dt", {}, name), el("dd", { dir: "auto" }, typeof value === "string" ? value : JSON.stringify(value))])));
  }));
}

// ---------------------------------------------------------------------------------------------------- curves

const familyColour = (index) => `--colour: var(--m${1 + (index % 7)})`;

// Round numbers, at most `most` of them.
function ticks(from, to, most) {
  const raw = (to - from) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(from / step - 1e-9);
  const last = Math.floor(to / step + 1e-9);
  return { decimals: decimalsFor(step, 1), at: range(last - first + 1).map((i) => (first + i) * step) };
}

function chart(title, curves, families, { neutral = null, factor = 1 } = {}) {
  const points = curves.flatMap((curve) => curve.points);
  const values = points.flatMap(({ y }) => [y.value, y.low ?? y.value, y.high ?? y.value]).concat(neutral ?? []);
  let [bottom, top] = [Math.min(...values), Math.max(...values)];
  const margin = (top - bottom || 1) * 0.06;
  [bottom, top] = [bottom - margin, top + margin];
  const ws = [...new Set(points.map((point) => point.w))].sort((a, b) => a - b);
  const [left, right] = ws.length > 1 ? [ws[0], ws.at(-1)] : [ws[0] - 1, ws[0] + 1];
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, title));
  const draw = () => {
    const [width, height] = [Math.max(240, figure.clientWidth), 220];
    const box = { left: 46, right: width - 18, top: 8, bottom: height - 24 };
    const x = (w) => box.left + 8 + ((w - left) / (right - left)) * (box.right - box.left - 16);
    const y = (value) => box.bottom - ((value - bottom) / (top - bottom)) * (box.bottom - box.top);
    const vertical = ticks(bottom * factor, top * factor, 7);
    let free = -Infinity;
    const labels = ws.filter((w) => x(w) - free >= 30 && ((free = x(w)), true));
    const label = `${title}: ${curves.map(({ name, points }) => `${name}: ${points.map((p) => `w ${p.w}: ${number(p.y.value * factor, vertical.decimals + 1)}`).join(", ")}`).join("; ")}`;
    figure.replaceChildren(figure.firstChild, svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label },
      ...vertical.at.flatMap((value) => [
        svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value / factor), y2: y(value / factor) }),
        svg("text", { x: box.left - 8, y: y(value / factor) + 4, "text-anchor": "end" }, number(value, vertical.decimals))]),
      neutral === null ? null : svg("line", { class: "neutral", x1: box.left, x2: box.right, y1: y(neutral), y2: y(neutral) }),
      ...labels.map((w) => svg("text", { x: x(w), y: box.bottom + 18, "text-anchor": "middle" }, String(w).replace("-", "−"))),
      svg("text", { x: box.right + 6, y: box.bottom + 18, "font-style": "italic" }, "w"),
      ...curves.flatMap(({ name, index, points }) => {
        const known = points.filter(({ y: { low, high } }) => low !== null && high !== null);
        const at = (p) => x(p.w) + 4 * (index - (families - 1) / 2); // intervals beside one another
        return [svg("g", { style: familyColour(index) },
          svg("polyline", { class: "curve", points: points.map((p) => [at(p), y(p.y.value)]).join(" ") }),
          ...known.map((p) => svg("line", { class: "whisker", x1: at(p), x2: at(p), y1: y(p.y.low), y2: y(p.y.high) })),
          ...points.map((p) => svg("circle", { class: "point", cx: at(p), cy: y(p.y.value), r: 3.5 },
            svg("title", {}, `${p.method}, w ${p.w}: ${number(p.y.value * factor, vertical.decimals + 1)} ${between(p.y, { show: (v) => number(v * factor, vertical.decimals + 1) })} (${name})`))))];
      })));
  };
  new ResizeObserver(draw).observe(figure);
  return figure;
}

// Two gains of each method against each other, with their intervals.
function scatter(title, xTitle, points) {
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, title));
  const span = (name) => {
    const values = points.flatMap((point) => [point[name].value, point[name].low ?? 0, point[name].high ?? 0, 0]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const margin = (high - low || 1) * 0.08;
    return [low - margin, high + margin];
  };
  const [[left, right], [bottom, top]] = [span("x"), span("y")];
  const draw = () => {
    const [width, height] = [Math.max(240, figure.clientWidth), 260];
    const box = { left: 46, right: width - 18, top: 8, bottom: height - 40 };
    const x = (value) => box.left + ((value - left) / (right - left)) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - bottom) / (top - bottom)) * (box.bottom - box.top);
    const [across, up] = [ticks(left, right, 6), ticks(bottom, top, 6)];
    const told = (point) => `${point.method}: ${number(point.x.value, 2, true)} ${xTitle}, ${number(point.y.value, 2, true)} ${title}`;
    figure.replaceChildren(figure.firstChild, svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": points.map(told).join("; ") },
      ...up.at.flatMap((value) => [
        svg("line", { class: value === 0 ? "neutral" : "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }),
        svg("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value, up.decimals))]),
      ...across.at.map((value) => svg("text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, number(value, across.decimals))),
      svg("line", { class: "neutral", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }),
      svg("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, xTitle),
      ...points.flatMap((point) => svg("g", { style: colour(methods.indexOf(point.method)) },
        point.x.low === null ? null : svg("line", { class: "whisker", x1: x(point.x.low), x2: x(point.x.high), y1: y(point.y.value), y2: y(point.y.value) }),
        point.y.low === null ? null : svg("line", { class: "whisker", x1: x(point.x.value), x2: x(point.x.value), y1: y(point.y.low), y2: y(point.y.high) }),
        svg("circle", { class: "point", cx: x(point.x.value), cy: y(point.y.value), r: 3.5 }, svg("title", {}, told(point)))))));
  };
  new ResizeObserver(draw).observe(figure);
  return figure;
}

function showHacking() {
  const gainOf = (reward, method) => report.standardised.find((row) => row.reward === reward && row.method === method)?.gain;
  const trained = report.trained_on;
  const charts = rewards.filter((reward) => reward !== trained).map((reward) => {
    const points = others.map((m) => ({ method: methods[m], x: gainOf(trained, methods[m]), y: gainOf(reward, methods[m]) }));
    return [reward, points.filter((point) => point.x && point.y)];
  }).filter(([, points]) => points.length > 0).map(([reward, points]) => scatter(reward, trained, points));
  byId("hacking-charts").append(...charts, el("ul", { class: "legend" }, ...others.map((m) => el("li", {}, named(methods[m])))));
}

function showCurves() {
  const families = [...new Set(report.sweeps.map((sweep) => sweep.family))];
  const curvesOf = (reward, measure) => report.sweeps.filter((sweep) => sweep.reward === reward).map((sweep) => ({
    name: sweep.family, index: families.indexOf(sweep.family),
    points: sweep.points.filter((point) => point[measure]?.value != null && point.w !== null)
      .map((point) => ({ w: point.w, method: point.method, y: point[measure] })).sort((a, b) => a.w - b.w),
  })).filter((curve) => curve.points.length > 0);
  byId("charts").append(
    el("ul", { class: "legend" }, ...families.map((name, i) => el("li", { style: familyColour(i) }, el("i", { class: "dot" }), el("bdi", {}, name)))),
    ...rewards.map((reward) => {
      const [wins, means] = [curvesOf(reward, "win_rate"), curvesOf(reward, "mean")];
      return wins.length + means.length === 0 ? null : el("div", { class: "charts" }, el("h3", {}, el("bdi", {}, reward)),
        wins.length ? chart(`Win rate over ${report.baseline}, %`, wins, families.length, { neutral: 0.5, factor: 100 }) : null,
        means.length ? chart("Mean score", means, families.length) : null);
    }).filter((charts) => charts !== null));
}

// ---------------------------------------------------------------------------------------------------- viewer

const ORDERS = { wins: "Largest wins", losses: "Largest losses", id: "Prompt id", random: "Random" };
const decimals = scores.map((table) => {
  const finite = Array.from(table.subarray(baseline * count, (baseline + 1) * count)).filter(Number.isFinite);
  const mean = finite.reduce((sum, x) => sum + x, 0) / (finite.length || 1);
  const deviation = Math.sqrt(finite.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (finite.length || 1));
  return deviation > 0 ? Math.min(6, Math.max(0, 2 - Math.round(Math.log10(deviation)))) : 2;
});
const gainOf = (item) => scoreOf(state.reward, state.method, item) - scoreOf(state.reward, baseline, item);
const searched = prompts.map((prompt) => prompt.toLowerCase());
const keyOf = (item) => `${data.ids[item]}-${data.seeds[item]}`;

const state = { reward: 0, method: others[0] ?? baseline, order: "wins", column: "", value: "", q: "", seed: 1, at: 0 };
let list = []; // items that match, in order
let rowHeight = 0;
const drawn = new Map(); // position -> row
const viewer = byId("viewer");
const rowsBox = byId("rows");

function arrange() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = state.column ? categories[state.column] : null;
  list = range(count).filter((item) =>
    (wanted === null || state.value === "" || (wanted[item] ?? "") === state.value.slice(1)) && words.every((word) => searched[item].includes(word)));
  if (state.order === "random") shuffle(list, random(state.seed));
  else if (state.order === "id") list.sort((a, b) => data.ids[a] - data.ids[b] || data.seeds[a] - data.seeds[b]);
  else {
    const sign = state.order === "wins" ? -1 : 1;
    const keys = new Float64Array(count);
    for (const item of list) {
      const gain = gainOf(item);
      keys[item] = Number.isFinite(gain) ? sign * gain : Infinity; // without a score: last
    }
    list.sort((a, b) => (keys[a] === keys[b] ? 0 : keys[a] - keys[b]) || data.ids[a] - data.ids[b] || data.seeds[a] - data.seeds[b]);
  }
}

function frame(item, method, position) {
  const source = imageSource(images, item, method);
  const missing = el("span", {}, source === undefined ? "loading" : "no image");
  const box = el("button", { type: "button", class: "frame", "aria-label": `Enlarge: ${methods[method]}`, disabled: source === null, click: () => zoom.open(position, method) });
  if (!source) return box.append(missing), box;
  const image = el("img", { alt: "", loading: "lazy", decoding: "async", draggable: "false", error: () => { box.replaceChildren(missing); box.disabled = true; } });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth * 2 <= image.clientWidth * devicePixelRatio));
  image.src = source;
  box.append(image);
  return box;
}

function scoreLines(item, method) {
  return el("div", { class: "scores" }, ...rewards.flatMap((name, reward) => {
    const score = scoreOf(reward, method, item);
    const most = Math.max(...range(methods.length).map((m) => scoreOf(reward, m, item)).filter(Number.isFinite));
    const change = method === baseline ? "" : number(score - scoreOf(reward, baseline, item), decimals[reward], true);
    const chosen = reward === state.reward ? " chosen" : "";
    return [
      el("span", { class: `reward${chosen}` }, el("bdi", {}, name)),
      el("span", { class: (methods.length > 1 && score === most ? "win" : "") + chosen }, number(score, decimals[reward]), score === most ? el("span", { class: "unseen" }, " best") : null),
      el("span", { class: "change" }, change),
    ];
  }));
}

function makeRow(position) {
  const item = list[position];
  const gain = gainOf(item);
  const facts = [`#${data.ids[item]}`, `seed ${data.seeds[item]}`, ...Object.values(categories).map((values) => values[item]).filter(Boolean)];
  return el("li", { class: "row", tabindex: "-1", "aria-posinset": position + 1, "aria-setsize": list.length, style: `transform: translateY(${position * rowHeight}px)` },
    el("div", { class: "about" }, el("div", {},
      el("span", { class: "where", title: facts.join(" · ") }, facts.join(" · ")),
      el("p", { class: "prompt", dir: "auto" }, prompts[item].slice(0, 1000)),
      others.length === 0 || rewards.length === 0 ? null : el("span", { class: "gain" },
        el("bdi", {}, methods[state.method]), " ", el("b", { class: gain > 0 ? "up" : gain < 0 ? "down" : null }, number(gain, decimals[state.reward], true)),
        ` ${rewards[state.reward]}`))),
    el("div", { class: "methods" }, ...range(methods.length).map((method) => el("div", { class: "method", style: colour(method) },
      images === null ? null : frame(item, method, position),
      el("div", { class: "head", title: methods[method] }, el("i", { class: "dot" }), el("bdi", {}, methods[method])),
      scoreLines(item, method)))));
}

const barHeight = () => (getComputedStyle(byId("bar")).position === "sticky" ? byId("bar").offsetHeight : 0);
const rowsTop = () => rowsBox.getBoundingClientRect().top;

// Rows within a screen of what is seen exist, no others.
function drawRows() {
  const top = rowsTop();
  const first = Math.max(0, Math.floor((-top - innerHeight / 2) / rowHeight));
  const last = Math.min(list.length - 1, Math.floor((1.5 * innerHeight - top) / rowHeight));
  for (const [position, row] of drawn) {
    if (position < first || position > last) { row.remove(); drawn.delete(position); }
  }
  for (let position = last; position >= first; position--) {
    if (drawn.has(position)) continue;
    const row = makeRow(position);
    row.classList.toggle("current", position === state.at);
    drawn.set(position, row);
    rowsBox.insertBefore(row, drawn.get(position + 1) ?? null);
  }
}

// All rows are as high as the first one: only the prompt differs, and it is cut to the lines that fit.
function measure() {
  const narrow = matchMedia("(max-width: 52rem)").matches;
  const width = rowsBox.clientWidth - (narrow ? 14 : 14 + 240 + 26);
  const most = Math.max(1, Math.min(methods.length, Math.floor((width + 16) / (narrow ? 150 : 166))));
  rowsBox.style.setProperty("--columns", Math.ceil(methods.length / Math.ceil(methods.length / most)));
  rowsBox.style.setProperty("--aspect", images?.aspect ?? 1);
  drawn.clear();
  rowsBox.replaceChildren();
  if (list.length === 0) { rowsBox.style.height = "0"; return; }
  const row = makeRow(0);
  rowsBox.append(row);
  rowHeight = row.offsetHeight;
  const lines = Math.floor((row.querySelector(".methods").offsetHeight - 70) / 21);
  rowsBox.style.setProperty("--lines", Math.max(2, lines));
  row.remove();
  rowsBox.style.height = `${list.length * rowHeight}px`;
}

function redraw() {
  const hidden = list.length === 0;
  byId("nothing").hidden = !hidden;
  byId("matches").textContent = list.length === count ? `${number(count)} ${count === 1 ? "pair" : "pairs"}` : `${number(list.length)} of ${number(count)}`;
  measure();
  if (!hidden) drawRows();
}

function update(changes, { keep = false } = {}) {
  const item = list[state.at];
  Object.assign(state, changes);
  arrange();
  state.at = keep ? Math.max(0, list.indexOf(item)) : 0;
  redraw();
  // A list that has changed is looked at from its beginning.
  if (viewer.getBoundingClientRect().top < 0) scrollToRow(0);
  remember();
}

function scrollToRow(position) {
  scrollTo({ top: scrollY + rowsTop() + position * rowHeight - barHeight(), behavior: "instant" });
}

function go(position, { scroll = true } = {}) {
  if (list.length === 0) return;
  state.at = Math.max(0, Math.min(list.length - 1, position));
  if (scroll) { scrollToRow(state.at); drawRows(); }
  for (const [at, row] of drawn) row.classList.toggle("current", at === state.at);
  const row = drawn.get(state.at);
  if (scroll && row) row.focus({ preventScroll: true });
  if (scroll) byId("live").textContent = prompts[list[state.at]].slice(0, 200);
  remember();
}

const watching = () => viewer.getBoundingClientRect().top < innerHeight / 2;

addEventListener("scroll", () => {
  if (list.length === 0) return;
  drawRows();
  // The current row follows what is scrolled to.
  const edge = barHeight() - rowsTop();
  const first = Math.floor(edge / rowHeight + 0.5);
  if (watching() && (state.at * rowHeight < edge - rowHeight / 2 || (state.at + 1) * rowHeight > edge + innerHeight)) go(Math.max(0, first), { scroll: false });
}, { passive: true });

let width = innerWidth;
addEventListener("resize", () => {
  if (list.length === 0 || (innerWidth === width && !images)) return drawRows();
  width = innerWidth;
  const at = state.at;
  redraw();
  if (watching()) { scrollToRow(at); drawRows(); }
});

// The address keeps what is looked at, so that it can be shared.
let later = 0;
function remember() {
  clearTimeout(later);
  later = setTimeout(() => {
    const fields = new URLSearchParams();
    if (state.reward !== 0) fields.set("reward", rewards[state.reward]);
    if (state.method !== others[0] && others.length) fields.set("method", methods[state.method]);
    if (state.order !== "wins") fields.set("order", state.order);
    if (state.order === "random") fields.set("seed", state.seed);
    if (state.column) fields.set("column", state.column);
    if (state.column && state.value) fields.set("value", state.value.slice(1));
    if (state.q) fields.set("q", state.q);
    if (list.length && (state.at > 0 || watching())) fields.set("at", keyOf(list[state.at]));
    if (zoom?.isOpen()) fields.set("zoom", methods[zoom.method]);
    const text = fields.toString();
    if (text || location.hash.includes("=")) history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }, 250);
}

function restore() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const index = (names, name, otherwise) => (names.includes(name) ? names.indexOf(name) : otherwise);
  state.reward = index(rewards, fields.get("reward"), 0);
  state.method = index(methods, fields.get("method"), others[0] ?? baseline);
  state.order = Object.hasOwn(ORDERS, fields.get("order") ?? "") && others.length ? fields.get("order") : others.length ? "wins" : "id";
  state.seed = Number(fields.get("seed")) >>> 0 || 1;
  state.column = Object.hasOwn(categories, fields.get("column") ?? "") ? fields.get("column") : "";
  state.value = state.column && fields.has("value") ? `=${fields.get("value")}` : "";
  state.q = fields.get("q") ?? "";
  arrange();
  const [id, seed] = (fields.get("at") ?? "").split(/(?<=\d)-/).map(Number);
  const at = fields.has("at") ? list.findIndex((item) => data.ids[item] === id && data.seeds[item] === seed) : -1;
  state.at = Math.max(0, at);
  showBar();
  redraw();
  if (at >= 0) go(at);
  if (at >= 0 && zoom && methods.includes(fields.get("zoom"))) zoom.open(at, methods.indexOf(fields.get("zoom")));
}

function showBar() {
  const columns = Object.keys(categories);
  const search = el("input", { type: "search", id: "search", placeholder: "Search prompts", "aria-label": "Search prompts", autocomplete: "off", spellcheck: "false", input: () => update({ q: search.value }) });
  search.value = state.q;
  const valueBox = () => {
    if (!state.column) return [];
    const counts = new Map();
    for (const value of categories[state.column]) counts.set(value ?? "", (counts.get(value ?? "") ?? 0) + 1);
    const options = [...counts].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true })).map(([value, n]) => [`=${value}`, `${value || "(none)"} (${number(n)})`]);
    return [select("is", [["", "any"], ...options], state.value, (value) => update({ value }), "Filter by value of the category")];
  };
  const slot = el("span", { class: "slot" }, ...valueBox());
  byId("bar").replaceChildren(...[
    search,
    others.length ? select("Order", Object.entries(ORDERS), state.order, (order) => update({ order, seed: order === "random" ? 1 + Math.floor(Math.random() * 1e6) : state.seed })) : null,
    others.length > 1 ? select("of", others.map((method) => [method, methods[method]]), state.method, (method) => update({ method: Number(method) }), "Order by the wins of") : null,
    rewards.length > 1 ? select("by", rewards.map((name, i) => [i, name]), state.reward, (reward) => update({ reward: Number(reward) }), "Order by the reward") : null,
    columns.length ? select("Where", [["", "any category"], ...columns.map((name) => [name, name])], state.column, (column) => {
      update({ column, value: "" });
      slot.replaceChildren(...valueBox());
    }, "Filter by category") : null,
    slot,
    el("output", { id: "matches", "aria-live": "polite" }),
  ].filter((part) => part !== null));
}

// ---------------------------------------------------------------------------------------------------- zoom

const zoom = images === null ? null : (() => {
  const [dialog, stage, buttons] = [byId("zoom"), byId("stage"), byId("zoom-methods")];
  const self = { method: baseline, isOpen: () => dialog.open };
  let shown = [];

  function fit() {
    const image = shown[self.method];
    if (!image?.naturalWidth) return;
    const factor = Math.min(stage.clientWidth / image.naturalWidth, stage.clientHeight / image.naturalHeight);
    image.classList.toggle("small", factor * devicePixelRatio >= 2);
    byId("zoom-facts").textContent = facts();
  }
  function facts() {
    const item = list[state.at];
    const image = shown[self.method];
    const size = image?.naturalWidth ? [`${image.naturalWidth} × ${image.naturalHeight} px`] : [];
    const told = rewards.map((name, reward) => {
      const score = scoreOf(reward, self.method, item);
      const change = self.method === baseline ? "" : ` (${number(score - scoreOf(reward, baseline, item), decimals[reward], true)})`;
      return `${name} ${number(score, decimals[reward])}${change}`;
    });
    return [...told, ...size, `${number(state.at + 1)} of ${number(list.length)}`].join("  ·  ");
  }
  function flip(method) {
    self.method = (method + methods.length) % methods.length;
    shown.forEach((image, m) => image?.classList.toggle("shown", m === self.method));
    [...buttons.children].forEach((button, m) => button.setAttribute("aria-pressed", m === self.method));
    byId("stage-none").hidden = shown[self.method] !== null;
    byId("zoom-facts").textContent = facts();
    fit();
    byId("live").textContent = methods[self.method];
    remember();
  }
  function show() {
    const item = list[state.at];
    shown = range(methods.length).map((method) => {
      const source = imageSource(images, item, method);
      if (!source) return null;
      const image = el("img", { alt: `${methods[method]}: ${prompts[item].slice(0, 200)}`, click: () => actual(!stage.classList.contains("actual")), load: fit });
      image.src = source;
      return image;
    });
    stage.replaceChildren(...shown.filter((image) => image !== null), el("p", { id: "stage-none" }, "no image"));
    byId("zoom-prompt").textContent = prompts[item];
    byId("zoom-prompt").scrollTop = 0;
    byId("zoom-previous").disabled = state.at === 0;
    byId("zoom-next").disabled = state.at === list.length - 1;
    flip(self.method);
  }
  function actual(on) {
    stage.classList.toggle("actual", on);
    byId("zoom-size").setAttribute("aria-pressed", on);
  }
  function step(by) { go(state.at + by); show(); }

  self.open = (position, method) => {
    go(position, { scroll: false });
    self.method = method;
    if (!dialog.open) { actual(false); dialog.showModal(); document.documentElement.style.overflow = "hidden"; }
    show();
    stage.focus();
  };
  self.refresh = () => { if (dialog.open) show(); };
  self.key = (event) => {
    const moves = {
      ArrowLeft: () => flip(self.method - 1), ArrowRight: () => flip(self.method + 1),
      ArrowUp: () => step(-1), k: () => step(-1), ArrowDown: () => step(1), j: () => step(1),
      z: () => actual(!stage.classList.contains("actual")),
    };
    if (/^[1-9]$/.test(event.key) && Number(event.key) <= methods.length) flip(Number(event.key) - 1);
    else if (Object.hasOwn(moves, event.key)) moves[event.key]();
    else return;
    event.preventDefault();
  };
  buttons.append(...methods.map((method, m) => el("button", { type: "button", style: colour(m), click: () => flip(m), title: method },
    el("i", { class: "dot" }), el("bdi", {}, method), m < 9 ? el("kbd", {}, String(m + 1)) : null)));
  byId("zoom-size").addEventListener("click", () => actual(!stage.classList.contains("actual")));
  byId("zoom-close").addEventListener("click", () => dialog.close());
  byId("zoom-previous").addEventListener("click", () => step(-1));
  byId("zoom-next").addEventListener("click", () => step(1));
  dialog.addEventListener("close", () => {
    document.documentElement.style.overflow = "";
    stage.replaceChildren();
    shown = [];
    const at = state.at;
    if (!drawn.has(at)) scrollToRow(at);
    drawRows();
    go(at, { scroll: false });
    drawn.get(at)?.focus({ preventScroll: true });
  });
  addEventListener("resize", () => { if (dialog.open) fit(); });
  return self;
})();

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (zoom?.isOpen()) return zoom.key(event);
  const typing = event.target.matches("input, select, textarea");
  if (typing) {
    if (event.target.id === "search" && (event.key === "Escape" || event.key === "Enter")) { event.target.blur(); go(state.at); }
    return;
  }
  const button = event.target.closest("button, a, summary");
  const moves = { j: 1, k: -1, ...(watching() ? { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1 } : {}) };
  if (event.key === "/") { viewer.scrollIntoView({ behavior: "instant" }); byId("search").focus({ preventScroll: true }); byId("search").select(); }
  else if (Object.hasOwn(moves, event.key)) go(watching() ? state.at + moves[event.key] : state.at);
  else if (event.key === "Home" && watching()) go(0);
  else if (event.key === "End" && watching()) go(list.length - 1);
  else if (event.key === "Enter" && watching() && !button && zoom) zoom.open(state.at, state.method);
  else if (/^[1-9]$/.test(event.key) && Number(event.key) <= methods.length && watching() && zoom) zoom.open(state.at, Number(event.key) - 1);
  else return;
  event.preventDefault();
});
addEventListener("hashchange", () => { if (location.hash.includes("=")) restore(); });
byId("clear").addEventListener("click", () => {
  Object.assign(state, { q: "", column: "", value: "" });
  showBar();
  update({});
});

if (rewards.length) showResults();
if (report.controls?.length) showFair();
if (report.standardised?.length) showHacking();
if (report.looks?.length) showLooks();
if (report.categories.length) showCategories();
if (report.benchmarks?.length) showBenchmarks();
if (report.sweeps.length) showCurves();
if (report.diversity.length) showDiversity();
if (report.sets.length) showSets();
if (report.votes.length) showVotes();
showMethods();
restore();
// Embedded images come behind this script: once all are here, the rows that were drawn without them are drawn again.
if (images?.embedded) addEventListener("DOMContentLoaded", () => { redraw(); zoom.refresh(); });
