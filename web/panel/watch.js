// Which run a panel shows, and its state as the server has it. Everything is asked of the server, so a reload loses nothing.
import { chooseRun, paced } from "./format.js";

const INTERVAL = 500; // ms between two requests, at least
const POLL = 5000; // ms; a run of another program sends this page no events
const SILENT = { key: "silent" };

/** The server's answers. `fetchApi(path, options)` is ComfyUI's own. Raises an Error with `status` for an answer that is none. */
export function server(fetchApi) {
  const ask = async (path, options) => {
    const answer = await fetchApi(path, options);
    if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
    return answer.json();
  };
  return {
    list: () => ask("/dancegrpo/runs"),
    run: (name) => ask(`/dancegrpo/runs/${encodeURIComponent(name)}`),
    stop: (name) => ask(`/dancegrpo/runs/${encodeURIComponent(name)}/stop`, { method: "POST" }),
  };
}

export class Watch {
  /**
   * ask: of `server`. isMine(node): whether a run's node is the panel's. runName(): of the linked Loop Start, or undefined.
   * changed(this) is called after everything new: `runs`, `active`, `shown` (a name or null), `run` (its state or null), and
   * `error`, null or the key and the values of a text.
   */
  constructor(ask, isMine, runName, changed, timers) {
    Object.assign(this, { ask, isMine, runName, changed, runs: [], active: null, shown: null, run: null, error: null, ready: false });
    this.chosen = false; // by the user, until this node's next run begins
    this.listWanted = true;
    this.training = null; // the run that this node trains
    this.refresh = paced(() => this.update(), INTERVAL, timers);
  }

  start() {
    this.timer ??= setInterval(() => this.poll(), POLL);
    this.refreshAll();
  }

  end() {
    clearInterval(this.timer);
    this.timer = undefined;
    this.refresh.cancel();
  }

  poll() {
    const moves = this.run && ["running", "stopping"].includes(this.run.state);
    if (!globalThis.document?.hidden && (moves || this.error)) this.refreshAll();
  }

  refreshAll() {
    this.listWanted = true;
    this.refresh();
  }

  /** One request: the list where it is wanted, else the shown run. */
  async update() {
    if (this.timer === undefined) return; // ended meanwhile
    try {
      if (this.listWanted) await this.updateList();
      else if (this.shown !== null) await this.updateRun(this.shown);
    } catch (error) {
      this.error = error.status ? { key: "answers", status: error.status, message: error.message } : SILENT;
    }
    this.changed(this);
  }

  async updateList() {
    this.listWanted = false;
    try {
      ({ runs: this.runs, active: this.active } = await this.ask.list());
    } catch (error) {
      this.listWanted = true;
      throw error;
    }
    [this.ready, this.error] = [true, null];
    this.training = this.active && this.isMine(this.active.node) ? this.active.run : null;
    const there = this.runs.some((run) => run.name === this.shown);
    if (!there) this.chosen = false;
    const best = chooseRun(this.active, this.runs, this.isMine, this.runName());
    if (!this.chosen && (best !== null || !there)) this.show(best);
    if (this.shown !== null) this.refresh();
  }

  async updateRun(name) {
    try {
      const run = await this.ask.run(name);
      if (name === this.shown) [this.run, this.error] = [run, null];
      else this.refresh(); // another was chosen meanwhile
    } catch (error) {
      if (error.status === 404 && name === this.shown) this.run = null;
      throw error;
    }
  }

  show(name) {
    if (name !== this.shown) this.run = null;
    this.shown = name;
  }

  /** The user's choice from the list. */
  choose(name) {
    this.chosen = true;
    this.show(name);
    this.refresh();
    this.changed(this);
  }

  /** A "dancegrpo.run" event. */
  told(data) {
    const running = data.state === "running";
    this.active = running ? data : this.active?.run === data.run ? null : this.active;
    if (this.isMine(data.node)) {
      if (running && this.training !== data.run) {
        [this.chosen, this.listWanted] = [false, true];
        this.show(data.run);
      }
      this.training = running ? data.run : null;
    }
    if (!running) this.listWanted = true;
    if (this.listWanted || data.run === this.shown) this.refresh();
  }

  /** Stop After This Iteration. */
  async stop() {
    try {
      await this.ask.stop(this.shown);
      if (this.run) this.run = { ...this.run, state: "stopping" };
    } catch (error) {
      if (!error.status) this.error = SILENT; // 404, 409: it has ended already
    }
    this.changed(this);
    this.refresh();
  }

  /** What is to be said below the shown run: null, or the key and the values of a text. */
  get note() {
    const { run } = this;
    if (this.error) return this.error;
    if (run?.state === "running" && this.active?.run !== run.name) return { key: "elsewhere" };
    if (run?.stopped_by) return { key: "stopped_by", reason: run.stopped_by };
    if (run?.state === "interrupted") return { key: run.kept ? "cut_off" : "cut_off_at_once", kept: run.kept };
    return null;
  }
}
