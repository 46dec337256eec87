const board = readJSON("data");
const MEASURES = { gain: "Gain over the baseline", mean: "Mean", win_rate: "Win rate, %" };
const several = new Set(board.rows.map((row) => row.report)).size > 1;
const state = { set: 0, measure: "gain", text: "", controls: true, sort: null, ascending: false };

const cellOf = (row, reward) => row.cells[reward]?.[state.measure] ?? null;
const shownRows = () => board.rows.filter((row) => row.set === state.set && (state.controls || !row.control)
  && `${row.method} ${row.report}`.toLowerCase().includes(state.text.toLowerCase()));

function keyOf(row) {
  if (state.sort === "method" || state.sort === "report") return row[state.sort];
  if (state.sort === "predictions" || state.sort === "seconds") return row[state.sort];
  return cellOf(row, state.sort)?.value ?? null;
}

function draw() {
  const inSet = board.rows.filter((row) => row.set === state.set);
  const rewards = board.rewards.filter((reward) => inSet.some((row) => reward in row.cells));
  const rows = shownRows();
  if (state.sort !== null) {
    rows.sort((a, b) => {
      const [x, y] = [keyOf(a), keyOf(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (state.ascending ? 1 : -1) * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
  }
  const percent = state.measure === "win_rate";
  const signed = state.measure === "gain";
  const decimals = Object.fromEntries(rewards.map((reward) => {
    const widths = inSet.map((row) => cellOf(row, reward)).filter((cell) => cell && cell.high !== null && cell.high > cell.low).map((cell) => cell.high - cell.low);
    return [reward, percent ? 1 : decimalsFor(widths.length ? Math.min(...widths) : 0.01, 2)];
  }));
  const best = Object.fromEntries(rewards.map((reward) => [reward, Math.max(...rows.map((row) => cellOf(row, reward)?.value ?? -Infinity))]));
  const show = (value, reward) => number(percent ? 100 * value : value, decimals[reward], signed);
  const head = (key, label, right = true) => {
    const order = state.sort === key ? (state.ascending ? "ascending" : "descending") : null;
    return el("th", { scope: "col", class: right ? "right" : null, "aria-sort": order },
      el("button", { type: "button", click: () => {
        state.ascending = state.sort === key ? !state.ascending : key === "method" || key === "report" || key === "predictions" || key === "seconds";
        state.sort = key;
        draw();
      } }, label));
  };
  const measured = (row, reward) => {
    const cell = cellOf(row, reward);
    if (cell === null) return el("td", { class: "right note" }, row.method === row.baseline && state.measure !== "mean" ? "baseline" : "–");
    return el("td", { class: cell.value === best[reward] ? "right best" : "right" }, show(cell.value, reward),
      cell.low === null ? null : el("span", { class: "range" }, ` [${show(cell.low, reward)}, ${show(cell.high, reward)}]`));
  };
  byId("board").replaceChildren(
    el("thead", {}, el("tr", {}, head("method", "Method", false), several ? head("report", "Report", false) : null,
      ...rewards.map((reward) => head(reward, reward)), head("predictions", "Predictions"), head("seconds", "Seconds"))),
    el("tbody", {}, ...rows.map((row) => el("tr", {},
      el("th", { scope: "row" }, el("bdi", {}, row.method), row.control ? el("span", { class: "note" }, " control") : null),
      several ? el("td", {}, el("bdi", {}, row.report)) : null,
      ...rewards.map((reward) => measured(row, reward)),
      el("td", { class: "right" }, row.predictions === null ? "–" : number(row.predictions)),
      el("td", { class: "right" }, row.seconds === null ? "–" : number(row.seconds, decimalsFor(row.seconds, 2)))))));
  byId("nothing").hidden = rows.length > 0;
  byId("live").textContent = `${rows.length} methods`;
}

const select = (label, options, value, change) => {
  const box = el("select", { change: () => { change(box.value); draw(); } }, ...options.map(([key, text]) => new Option(text, key)));
  box.value = value;
  return el("label", {}, label, box);
};
const search = el("input", { type: "search", placeholder: "Method or report", "aria-label": "Filter methods", input: () => { state.text = search.value; draw(); } });
const tick = el("input", { type: "checkbox", change: () => { state.controls = tick.checked; draw(); } });
tick.checked = true;
const told = ({ prompts, pairs, reports }) => `${number(prompts)} prompts, ${number(pairs)} images (${reports.join(", ")})`;
byId("controls").append(...[
  board.sets.length > 1 ? select("Prompts", board.sets.map((set, i) => [String(i), told(set)]), "0", (value) => { state.set = Number(value); state.sort = null; }) : null,
  select("Show", Object.entries(MEASURES), state.measure, (value) => { state.measure = value; }),
  search,
  board.rows.some((row) => row.control) ? el("label", {}, tick, "controls") : null,
].filter((node) => node !== null));
byId("clear").addEventListener("click", () => {
  Object.assign(state, { text: "", controls: true });
  search.value = "";
  tick.checked = true;
  draw();
});
draw();
