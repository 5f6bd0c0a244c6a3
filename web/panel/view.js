// The panel's page: built once, and from then on only what has changed is touched. Data goes in as text, never as HTML.
import { Chart } from "./charts.js";
import { band, duration, evaluation, figure, groupKey, runLabel, signed, tiling, xRange, yRange } from "./format.js";

const STATES = ["running", "stopping", "stopped", "finished"];
const CURVES = [
  { key: "reward_mean", spread: "reward_std", title: "Reward", rows: 28, y: (data) => yRange(data.slice(1)) },
  { key: "clip_fraction", title: "Clip fraction", rows: 15, y: (data) => yRange(data.slice(1), 0) },
  { key: "approx_kl", title: "KL", rows: 15, y: (data) => yRange(data.slice(1), 0) },
];

function make(tag, name, parent, text = "") {
  const element = document.createElement(tag);
  element.className = `dancegrpo-${name}`;
  element.textContent = text;
  parent?.append(element);
  return element;
}

/** Sets text where it differs: an unchanged page is not laid out again. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export class View {
  /** actions: choose(name), stop(), opened() (the list is about to open), pictureURL(run, sample). */
  constructor(actions) {
    this.actions = actions;
    this.root = make("div", "panel");
    const head = make("div", "row", this.root);
    this.select = make("select", "select", head);
    this.select.title = "Runs in the output folder";
    this.select.setAttribute("aria-label", "Run");
    this.select.addEventListener("pointerdown", () => actions.opened());
    this.select.addEventListener("change", () => actions.choose(this.select.value));
    this.state = make("span", "state", head);
    this.body = make("div", "body", this.root);
    this.makeProgress();
    this.evaluations = make("div", "evaluations", this.body);
    this.makeCharts();
    this.makeGroup();
    this.empty = make("div", "empty", this.root);
    make("p", "empty-title", this.empty, "No run to show yet");
    make("p", "empty-text", this.empty, "Press Run: the reward curve, the last group's pictures with their scores, and the time left appear here while it trains. "
      + "Runs that are on disk can be opened above.");
    this.note = make("div", "note", this.root);
    this.note.setAttribute("role", "status");
    this.options = this.shownKey = this.failedKey = "";
    this.columns = null;
    this.seen = new ResizeObserver(() => this.fitTiles());
    this.seen.observe(this.tiles);
    this.themes = new MutationObserver(() => this.theme());
    for (const element of [document.documentElement, document.body]) this.themes.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    this.theme();
  }

  makeProgress() {
    const row = make("div", "row", this.body);
    const told = make("div", "progress", row);
    const line = make("div", "progress-line", told);
    this.iteration = make("span", "iteration", line);
    this.iteration.title = "Iterations done, and in all";
    this.left = make("span", "left", line);
    this.bar = make("div", "bar-done", make("div", "bar", told));
    this.stop = make("button", "stop", row, "Stop After This Iteration");
    this.stop.type = "button";
    this.stop.addEventListener("click", () => this.actions.stop());
  }

  makeCharts() {
    const colours = () => this.colours;
    const small = make("div", "small");
    this.charts = CURVES.map((curve, i) => {
      const figureBox = make("div", i ? "curve" : "curve-main", i ? small : this.body);
      const head = make("div", "curve-head", figureBox);
      make("span", "curve-title", head, curve.title);
      const readout = make("span", "readout", head);
      const chart = new Chart(make("div", "plot", figureBox), { spread: !!curve.spread, yRange: curve.y, rows: curve.rows, colours, hover: (index) => this.mark(index) });
      return { ...curve, chart, readout };
    });
    this.body.append(small);
  }

  makeGroup() {
    this.group = make("div", "group", this.body);
    const head = make("div", "curve-head", this.group);
    this.prompt = make("span", "prompt", head);
    this.reward = make("span", "reward", head);
    this.tiles = make("div", "tiles", this.group);
  }

  update(watch) {
    const run = watch.run;
    this.updateSelect(watch);
    this.body.hidden = !run;
    this.empty.hidden = !!run || !watch.ready || watch.shown !== null;
    this.state.hidden = !run;
    write(this.note, watch.error || (watch.elsewhere ? "Not trained by this server: another program trains it, or it was cut off." : ""));
    this.note.classList.toggle("dancegrpo-error", !!watch.error);
    this.note.hidden = !this.note.textContent;
    if (!run) return;
    write(this.state, run.state ?? "unknown");
    this.state.dataset.state = STATES.includes(run.state) ? run.state : "unknown";
    this.updateProgress(run);
    this.updateEvaluations(run.evaluations ?? {});
    this.updateCurves(run);
    this.updateGroup(run);
  }

  updateSelect({ runs, shown }) {
    const key = JSON.stringify([runs, shown]);
    if (key === this.options) return;
    this.options = key;
    const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
    const options = runs.map((run) => option(run.name, runLabel(run)));
    if (shown === null) options.unshift(option("", runs.length ? "Open a run…" : "No runs yet"));
    else if (!runs.some((run) => run.name === shown)) options.unshift(option(shown, shown));
    options[0].disabled = shown === null;
    this.select.replaceChildren(...options);
    this.select.value = shown ?? "";
    this.select.disabled = !runs.length;
  }

  updateProgress(run) {
    const active = run.state === "running" || run.state === "stopping";
    const total = Math.max(run.iterations || 0, run.iteration || 0);
    write(this.iteration, `${run.iteration} / ${total || "?"}`);
    const left = duration(run.seconds_left);
    write(this.left, run.state === "running" && left ? `${left} left` : "");
    this.bar.style.width = `${total ? (100 * run.iteration) / total : 0}%`;
    this.stop.hidden = !active;
    this.stop.disabled = run.state !== "running";
    write(this.stop, run.state === "stopping" ? "Stopping…" : "Stop After This Iteration");
  }

  updateEvaluations(found) {
    const key = JSON.stringify(found);
    if (this.evaluations.dataset.key === key) return;
    this.evaluations.dataset.key = key;
    const entries = Object.entries(found);
    this.evaluations.hidden = !entries.length;
    const cells = ["Evaluation", "before", "after", "gain"].map((text) => make("span", "cell-head", null, text));
    for (const [name, values] of entries) {
      const { before, after, gain, sure } = evaluation(values);
      const title = make("span", "cell-name", null, name);
      title.title = `${name}, ${values.n} prompts; ± is the 95 % interval of the gain`;
      const last = make("span", "cell", null, gain);
      last.dataset.sign = sure;
      cells.push(title, make("span", "cell", null, before), make("span", "cell", null, after), last);
    }
    this.evaluations.replaceChildren(...cells);
  }

  updateCurves({ name, columns, iterations }) {
    const key = JSON.stringify([name, columns, iterations]);
    if (key === this.curvesKey) return;
    [this.curvesKey, this.columns] = [key, columns];
    const x = columns.iteration;
    const range = xRange(x.at(-1) ?? 0, iterations);
    for (const { chart, key: column, spread } of this.charts) {
      chart.show([x, columns[column], ...(spread ? band(columns[column], columns[spread]) : [])], range);
    }
    this.mark(this.marked ?? null);
  }

  /** Shows the point under the cursor in every chart, or the last one. */
  mark(index) {
    if (!this.columns) return;
    const there = index !== null && index < this.columns.iteration.length;
    this.marked = there ? index : null;
    const at = there ? index : this.columns.iteration.length - 1;
    for (const { chart, readout, key, spread } of this.charts) {
      chart.mark(this.marked);
      const value = figure(this.columns[key][at]) + (spread ? ` ± ${figure(this.columns[spread][at], 2)}` : "");
      write(readout, at < 0 ? "" : there && spread ? `iteration ${this.columns.iteration[at]}:  ${value}` : value);
    }
  }

  /** All pictures of a group appear at once, when the browser has them; until then the former group stays. */
  async updateGroup(run) {
    const { name, group } = run;
    this.group.hidden = !group?.samples?.length;
    const key = groupKey(name, group);
    if (this.group.hidden || key === this.shownKey || key === this.loadingKey) return;
    this.loadingKey = key;
    const pictures = group.samples.map((sample) => {
      const picture = make("img", "picture");
      [picture.alt, picture.draggable, picture.src] = ["", false, this.actions.pictureURL(name, sample)];
      return picture;
    });
    const loaded = await Promise.all(pictures.map((picture) => picture.decode().then(() => true, () => false)));
    if (this.loadingKey !== key) return; // a later group has come
    this.loadingKey = "";
    const moves = run.state === "running" || run.state === "stopping";
    if (loaded.includes(false) && (moves || this.failedKey !== key)) { // the next iteration has replaced them: ask what is there now
      const again = this.failedKey === key;
      this.failedKey = key;
      if (!again) this.actions.refresh(); // once at once, then with what comes next
      return;
    }
    this.shownKey = key;
    write(this.prompt, group.prompt);
    this.prompt.title = group.prompt;
    write(this.reward, group.reward ?? "");
    this.tiles.replaceChildren(...group.samples.map((sample, i) => {
      const tile = make("div", "tile");
      tile.title = `score ${figure(sample.score)}, advantage ${signed(sample.advantage, 3)}`;
      tile.append(pictures[i]);
      make("span", "score", tile, figure(sample.score));
      make("span", "advantage", tile, signed(sample.advantage)).dataset.sign = Math.sign(sample.advantage);
      return tile;
    }));
    this.fitTiles();
  }

  fitTiles() {
    const count = this.tiles.childElementCount; // and the box may be up to half a pixel narrower than it says
    if (!count) return;
    const [size, columns] = tiling(this.tiles.clientWidth - 1, this.tiles.clientHeight, count, 15, 6);
    this.tiles.style.setProperty("--tile", `${size}px`);
    this.tiles.style.setProperty("--columns", columns);
  }

  /** Light or dark, by the colour of the text that the page gives the panel. */
  theme() {
    const [r, g, b] = (getComputedStyle(document.documentElement).getPropertyValue("--input-text") && this.textColour()) || [221, 221, 221];
    const dark = 0.299 * r + 0.587 * g + 0.114 * b > 127;
    if (this.root.dataset.theme === (dark ? "dark" : "light")) return;
    this.root.dataset.theme = dark ? "dark" : "light";
    this.colours = dark
      ? { line: "#60a5fa", band: "rgba(96, 165, 250, 0.22)", grid: "rgba(255, 255, 255, 0.09)", text: "#a3a3a3" }
      : { line: "#2563eb", band: "rgba(37, 99, 235, 0.16)", grid: "rgba(0, 0, 0, 0.09)", text: "#5f6368" };
    for (const { chart } of this.charts) chart.redraw();
  }

  textColour() {
    const probe = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    const style = document.createElement("span");
    style.style.color = "var(--input-text)";
    document.body.append(style);
    probe.fillStyle = getComputedStyle(style).color;
    style.remove();
    probe.fillRect(0, 0, 1, 1);
    return probe.getImageData(0, 0, 1, 1).data;
  }

  end() {
    this.seen.disconnect();
    this.themes.disconnect();
    for (const { chart } of this.charts) chart.end();
  }
}
