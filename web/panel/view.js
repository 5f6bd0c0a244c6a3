// The panel's page: built once, and from then on only what has changed is touched. Data goes in as text, never as HTML.
import { Chart } from "./charts.js";
import { band, duration, evaluation, figure, groupKey, runLabel, signed, stateOf, tiling, xRange, yRange } from "./format.js";

const CURVES = [
  { key: "reward_mean", spread: "reward_std", title: "reward", rows: 28, y: (data) => yRange(data.slice(1)) },
  { key: "clip_fraction", title: "clip_fraction", rows: 15, y: (data) => yRange(data.slice(1), 0) },
  { key: "approx_kl", title: "kl", rows: 15, y: (data) => yRange(data.slice(1), 0) },
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
  /** actions: choose(name), stop(), opened() (the list is about to open), pictureURL(run, sample). text: of `texts`. */
  constructor(actions, text) {
    [this.actions, this.text, this.fixed] = [actions, text, []];
    this.root = make("div", "panel");
    const head = make("div", "row", this.root);
    this.select = make("select", "select", head);
    this.say(this.select, "runs", "title");
    this.say(this.select, "run", "ariaLabel");
    this.select.addEventListener("pointerdown", () => actions.opened());
    this.select.addEventListener("change", () => actions.choose(this.select.value));
    this.state = make("span", "state", head);
    this.body = make("div", "body", this.root);
    this.makeProgress();
    this.evaluations = make("div", "evaluations", this.body);
    this.makeCharts();
    this.watched = make("div", "small", this.body);
    [this.watchCharts, this.watched.hidden] = [[], true];
    this.makeGroup();
    this.empty = make("div", "empty", this.root);
    this.say(make("p", "empty-title", this.empty), "empty_title");
    this.say(make("p", "empty-text", this.empty), "empty_text");
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

  /** Gives an element a text that stays, in whatever language. */
  say(element, key, property = "textContent") {
    this.fixed.push([element, key, property]);
    element[property] = this.text(key);
  }

  /** Another language. */
  translate(text, watch) {
    this.text = text;
    for (const [element, key, property] of this.fixed) element[property] = text(key);
    this.options = this.shownKey = this.watchedKey = this.evaluations.dataset.key = "";
    this.makeWatched([]);
    this.update(watch);
    this.mark(this.marked ?? null);
  }

  makeProgress() {
    const row = make("div", "row", this.body);
    const told = make("div", "progress", row);
    const line = make("div", "progress-line", told);
    this.iteration = make("span", "iteration", line);
    this.say(this.iteration, "iterations", "title");
    this.left = make("span", "left", line);
    this.bar = make("div", "bar-done", make("div", "bar", told));
    this.stop = make("button", "stop", row, this.text("stop"));
    this.stop.type = "button";
    this.stop.addEventListener("click", () => this.actions.stop());
  }

  makeCharts() {
    const colours = () => this.colours;
    const small = make("div", "small");
    this.charts = CURVES.map((curve, i) => {
      const figureBox = make("div", i ? "curve" : "curve-main", i ? small : this.body);
      const head = make("div", "curve-head", figureBox);
      this.say(make("span", "curve-title", head), curve.title);
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
    const { key, ...values } = watch.note ?? {};
    write(this.note, key ? this.text(key, values) : "");
    this.note.classList.toggle("dancegrpo-error", !!watch.error);
    this.note.hidden = !this.note.textContent;
    if (!run) return;
    this.state.dataset.state = stateOf(run.state);
    write(this.state, this.text(`state_${stateOf(run.state)}`));
    this.updateProgress(run);
    this.updateEvaluations(run.evaluations ?? {});
    this.updateCurves(run);
    this.updateWatched(run);
    this.updateGroup(run);
  }

  updateSelect({ runs, shown }) {
    const key = JSON.stringify([runs, shown]);
    if (key === this.options) return;
    this.options = key;
    const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
    const options = runs.map((run) => option(run.name, runLabel(run, this.text)));
    if (shown === null) options.unshift(option("", this.text(runs.length ? "open" : "no_runs")));
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
    write(this.left, run.state === "running" && left ? this.text("left", { time: left }) : "");
    this.bar.style.width = `${total ? (100 * run.iteration) / total : 0}%`;
    this.stop.hidden = !active;
    this.stop.disabled = run.state !== "running";
    write(this.stop, this.text(run.state === "stopping" ? "stopping" : "stop"));
  }

  updateEvaluations(found) {
    const key = JSON.stringify(found);
    if (this.evaluations.dataset.key === key) return;
    this.evaluations.dataset.key = key;
    const entries = Object.entries(found);
    this.evaluations.hidden = !entries.length;
    const cells = ["evaluation", "before", "after", "gain"].map((key) => make("span", "cell-head", null, this.text(key)));
    for (const [name, values] of entries) {
      const { before, after, gain, sure } = evaluation(values);
      const title = make("span", "cell-name", null, name);
      title.title = this.text("evaluation_tip", { name, count: values.n });
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

  /** A chart for each watch reward, in one row; they appear with the first evaluation. */
  updateWatched({ name, columns, watched, iterations }) {
    const key = JSON.stringify([name, watched, columns.iteration.at(-1), iterations]);
    if (key === this.watchedKey) return;
    this.watchedKey = key;
    const rewards = Object.keys(watched?.rewards ?? {});
    this.watched.hidden = !rewards.length;
    if (JSON.stringify(this.watchCharts.map((shown) => shown.reward)) !== JSON.stringify(rewards)) this.makeWatched(rewards);
    const [, last] = xRange(columns.iteration.at(-1) ?? 0, iterations);
    for (const { reward, chart, readout } of this.watchCharts) {
      const values = watched.rewards[reward];
      chart.show([watched.iteration, values], [0, last]); // the first evaluation is from before training
      write(readout, this.text("watch_now", { value: figure(values.at(-1)), change: signed(values.at(-1) - values[0], null) }));
    }
  }

  makeWatched(rewards) {
    for (const { chart } of this.watchCharts) chart.end();
    this.watched.replaceChildren();
    this.watched.style.gridTemplateColumns = `repeat(${rewards.length}, minmax(0, 1fr))`;
    this.watchCharts = rewards.map((reward) => {
      const figureBox = make("div", "curve", this.watched);
      const head = make("div", "curve-head", figureBox);
      make("span", "curve-title", head, reward).title = this.text("watched_tip", { name: reward });
      const readout = make("span", "readout", head);
      const chart = new Chart(make("div", "plot", figureBox), { spread: false, yRange: (data) => yRange(data.slice(1)), rows: 15, colours: () => this.colours, hover: () => {} });
      return { reward, chart, readout };
    });
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
      write(readout, at < 0 ? "" : there && spread ? this.text("at_iteration", { iteration: this.columns.iteration[at], value }) : value);
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
      tile.title = this.text("sample_tip", { score: figure(sample.score), advantage: signed(sample.advantage, 3) });
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
    for (const { chart } of [...this.charts, ...this.watchCharts ?? []]) chart.redraw();
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
    for (const { chart } of [...this.charts, ...this.watchCharts]) chart.end();
  }
}
