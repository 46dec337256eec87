const data = readJSON("items");
const { methods, baseline, images } = data;
const prompts = decoded(data.prompts);
const KEY = `flax_pref.votes.${data.id}`;

// A vote is [item, method on the left, method on the right, "left" | "right" | "tie", when].
let kept = { seed: Math.floor(Math.random() * 1e6), choice: "baseline", votes: [] };
try {
  kept = { ...kept, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
} catch {
  byId("unkept").hidden = false;
}
function keep() {
  try { localStorage.setItem(KEY, JSON.stringify(kept)); } catch { byId("unkept").hidden = false; }
  told();
}

const pairs = range(methods.length).flatMap((a) => range(a).map((b) => [b, a]));
const chosenPairs = (choice) =>
  choice === "any" ? pairs : choice === "baseline" ? pairs.filter((pair) => pair.includes(baseline)) : [choice.split("-").map(Number)];
const taskKey = (item, a, b) => `${item} ${Math.min(a, b)} ${Math.max(a, b)}`;

let tasks = []; // [item, left, right] in the order of this seed
let voted = new Set();
let task = null;
let ready = false; // both images are seen, so that a vote counts
const broken = new Set();

function plan() {
  const draw = random(kept.seed);
  tasks = chosenPairs(kept.choice).flatMap(([a, b]) => range(data.ids.length)
    .filter((item) => imageSource(images, item, a) && imageSource(images, item, b)).map((item) => [item, a, b]));
  tasks = shuffle(tasks, draw).map(([item, a, b]) => (draw() < 0.5 ? [item, a, b] : [item, b, a]));
  voted = new Set(kept.votes.map(([item, left, right]) => taskKey(item, left, right)));
}

const open = ([item, left, right]) => !voted.has(taskKey(item, left, right)) && !broken.has(taskKey(item, left, right));

// Images are drawn on canvases: no address tells a voter what they are.
const loaded = new Map();
function load([item, ...sides]) {
  const key = `${item} ${sides}`;
  if (!loaded.has(key)) {
    if (loaded.size > 1) loaded.delete(loaded.keys().next().value); // this one and the next are enough
    loaded.set(key, Promise.all(sides.map(async (method) => {
      const image = new Image();
      image.src = imageSource(images, item, method);
      await image.decode();
      return image;
    })));
    loaded.get(key).catch(() => {});
  }
  return loaded.get(key);
}

function size() {
  for (const canvas of document.querySelectorAll("canvas")) {
    const factor = Math.min(canvas.clientWidth / canvas.width, canvas.clientHeight / canvas.height);
    canvas.classList.toggle("small", factor * devicePixelRatio >= 2);
  }
}

async function next() {
  const here = tasks.findIndex(open);
  task = here < 0 ? null : tasks[here];
  ready = false;
  byId("pair").classList.add("waiting");
  told();
  if (task === null) return show("done");
  const asked = task;
  byId("prompt").textContent = prompts[task[0]];
  byId("prompt").scrollTop = 0;
  let both;
  try {
    both = await load(asked);
  } catch {
    broken.add(taskKey(...asked));
    return task === asked ? next() : undefined;
  }
  if (task !== asked) return;
  document.querySelectorAll("canvas").forEach((canvas, side) => {
    canvas.width = both[side].naturalWidth;
    canvas.height = both[side].naturalHeight;
    canvas.getContext("2d").drawImage(both[side], 0, 0);
  });
  byId("pair").classList.remove("waiting");
  size();
  ready = true;
  const following = tasks.slice(here + 1).find(open);
  if (following) load(following);
}

function vote(choice) {
  if (!ready) return;
  ready = false;
  kept.votes.push([...task, choice, new Date().toISOString()]);
  voted.add(taskKey(...task));
  keep();
  next();
}

function undo() {
  if (kept.votes.length === 0) return;
  const [item, left, right] = kept.votes.pop();
  voted.delete(taskKey(item, left, right));
  keep();
  show("voting");
  next();
}

function told() {
  const made = kept.votes.length;
  const done = tasks.filter(([item, left, right]) => voted.has(taskKey(item, left, right))).length;
  byId("progress").textContent = `${number(done)} of ${number(tasks.length)}`;
  byId("bar").style.width = `${tasks.length ? (100 * done) / tasks.length : 0}%`;
  byId("undo").disabled = made === 0;
  byId("export").disabled = made === 0;
  byId("export").textContent = made === 0 ? "Export votes" : `Export ${number(made)} ${made === 1 ? "vote" : "votes"}`;
  byId("delete").hidden = made === 0;
  byId("begin").textContent = made === 0 ? "Begin" : "Go on";
  byId("kept").textContent = made === 0 ? "" : `${number(made)} ${made === 1 ? "vote is" : "votes are"} kept in this browser.`;
  byId("done-text").textContent = tasks.length === 0 ? "There is no pair of images to vote on." : `All ${number(tasks.length)} pairs have your vote.`;
}

function show(section) {
  for (const id of ["setup", "voting", "done"]) byId(id).hidden = id !== section;
  byId("stop").hidden = section === "setup";
  byId("stop").textContent = section === "done" ? "Back" : "Stop";
  // Names are on the page only before voting begins.
  const box = byId("choice");
  box.replaceChildren();
  if (section !== "setup") return;
  const choices = [["baseline", "the baseline with every other method, mixed"], ["any", "any two methods, mixed"],
    ...pairs.map(([a, b]) => [`${a}-${b}`, `${methods[a]}  –  ${methods[b]}`])];
  box.append(...choices.filter(([, text], i) => i === 0 || methods.length > 2).map(([value, text]) => new Option(text, value)));
  box.value = kept.choice;
  if (box.selectedIndex < 0) box.selectedIndex = 0;
  byId("seed").value = kept.seed;
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  kept.choice = byId("choice").value;
  kept.seed = Number(byId("seed").value);
  keep();
  show("voting");
  plan();
  next();
  byId("prompt").focus();
});
byId("stop").addEventListener("click", () => { task = null; ready = false; show("setup"); told(); });
byId("undo").addEventListener("click", undo);
byId("delete").addEventListener("click", () => {
  if (!confirm(`Delete ${kept.votes.length} votes?`)) return;
  kept.votes = [];
  voted.clear();
  keep();
});
byId("export").addEventListener("click", () => {
  const votes = kept.votes.map(([item, left, right, vote, at]) => ({
    prompt_id: data.ids[item], prompt: prompts[item], seed: data.seeds[item], left: methods[left], right: methods[right], vote, at,
  }));
  const text = JSON.stringify({ kind: "flax_pref votes", methods, votes }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: `votes-${data.id.slice(0, 8)}-${votes.length}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});
for (const button of document.querySelectorAll("[data-vote]")) {
  button.addEventListener("click", () => { vote(button.dataset.vote); byId("prompt").focus({ preventScroll: true }); });
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || byId("voting").hidden) return;
  const votes = { ArrowLeft: "left", a: "left", ArrowRight: "right", l: "right", ArrowDown: "tie", " ": "tie" };
  if (Object.hasOwn(votes, event.key)) vote(votes[event.key]);
  else if (event.key === "u" || event.key === "Backspace") undo();
  else if (event.key === "Escape") byId("stop").click();
  else return;
  event.preventDefault();
});
addEventListener("resize", size);

show("setup");
told();
// Embedded images come behind this script: there is nothing to vote on until they are here.
byId("begin").disabled = true;
const begin = () => { byId("begin").disabled = false; };
if (document.readyState === "loading") addEventListener("DOMContentLoaded", begin);
else begin();
