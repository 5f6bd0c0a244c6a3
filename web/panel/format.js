// What the panel computes: no page, no server, no state. Tested by itself.

/** Seconds as m:ss, from an hour on as h:mm:ss; "" where they are not known. */
export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "";
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** A number in at most `digits` significant digits; "–" where there is none. */
export function figure(value, digits = 4) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return minus(value.toExponential(1).replace("e+", "e"));
  return minus(String(size >= 1000 ? Math.round(value) : Number(value.toPrecision(digits))));
}

/** The same with its sign always written. */
export function signed(value, digits = 2) {
  if (!Number.isFinite(value)) return "–";
  const text = digits === null ? figure(value) : minus(value.toFixed(digits));
  return value > 0 ? `+${text}` : text;
}

function minus(text) {
  return text.replace("-", "−").replace("e−", "e-"); // a minus as wide as the plus
}

/** The curve's x range: all iterations where the curve fills enough of them to be read, else those done. */
export function xRange(last, total) {
  const whole = total <= 100 || last * 4 >= total;
  return [1, Math.max(whole ? total || 0 : 0, last, 2)];
}

/** A y range that holds every number of the columns with a margin; `floor` is in it too where it is a number. */
export function yRange(columns, floor = null) {
  let [low, high] = floor === null ? [Infinity, -Infinity] : [floor, floor];
  for (const value of columns.flat()) {
    if (value === null || !Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return [0, 1];
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  return [low === floor ? low : low - margin, high + margin];
}

/** Mean ± spread: the band's lower and upper edge, null where either is unknown. */
export function band(means, spreads) {
  const edge = (sign) => means.map((mean, i) => (known(mean) && known(spreads[i]) ? mean + sign * spreads[i] : null));
  return [edge(-1), edge(1)];
}

function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Whether `name` is a run that Loop Start's `runName` makes: itself, or "-2", "-3" ... after it. */
export function isOf(name, runName) {
  return name === runName || (name.startsWith(`${runName}-`) && /^[0-9]+$/.test(name.slice(runName.length + 1)));
}

/** Whether a run's node, as the server names it ("4", or "12:4" inside a subgraph), is this one. */
export function isNode(told, id, inSubgraph = false) {
  const name = String(told ?? "");
  return name === String(id) || (inSubgraph && name.endsWith(`:${id}`));
}

/** The run to show first: the one that this node trains now, else the newest of its Loop Start's name, else null. */
export function chooseRun(active, runs, isMine, runName) {
  if (active && isMine(active.node)) return active.run;
  return runs.find((run) => runName && isOf(run.name, runName))?.name ?? null;
}

export const STATES = ["running", "stopping", "stopped", "finished", "interrupted"];

/** One of `STATES`, or "unknown". */
export function stateOf(state) {
  return STATES.includes(state) ? state : "unknown";
}

/** One line in the list of runs, in the words of `text`. */
export function runLabel(run, text) {
  const key = run.iteration ? (run.iteration === 1 ? "run_line_one" : "run_line_many") : "run_line";
  return text(key, { name: run.name, state: text(`state_${stateOf(run.state)}`), count: run.iteration });
}

/** An evaluation's figures as text: before, after, and the gain with half the width of its 95 % interval. */
export function evaluation(found) {
  const [low, high] = found.ci95 ?? [];
  const half = known(low) && known(high) ? ` ± ${figure((high - low) / 2, 2)}` : "";
  return { before: figure(found.before), after: figure(found.after), gain: signed(found.gain, null) + half,
           sure: half ? (low > 0 ? 1 : high < 0 ? -1 : 0) : 0 };
}

/**
 * [width, columns] of square pictures, so that `count` of them with `below` px of caption fill a box; where they would be smaller
 * than `least`, they scroll. More columns are better than pictures that are only a little larger.
 */
export function tiling(width, height, count, below, gap, least = 78, most = 256) {
  let [best, chosen] = [0, 1];
  for (let columns = count; columns >= 1; columns--) {
    const rows = Math.ceil(count / columns);
    const size = Math.min((width - gap * (columns - 1)) / columns, (height - gap * (rows - 1)) / rows - below, most);
    if (size > best * 1.2) [best, chosen] = [size, columns];
  }
  return best >= least ? [Math.floor(best), chosen] : [least, Math.max(1, Math.floor((width + gap) / (least + gap)))];
}

/** What a group's pictures are told apart by. */
export function groupKey(name, group) {
  return group ? JSON.stringify([name, group.prompt, group.samples]) : "";
}

/**
 * A function that calls the async `work`, never twice at once and with at least `interval` ms between two starts; a call that
 * comes too early is made later, and many of them are made one.
 */
export function paced(work, interval, timers = { now: () => Date.now(), set: setTimeout.bind(globalThis), clear: clearTimeout.bind(globalThis) }) {
  let [started, busy, wanted, timer] = [-Infinity, false, false, null];
  const run = async () => {
    timer = null;
    [started, busy, wanted] = [timers.now(), true, false];
    try {
      await work();
    } finally {
      busy = false;
      if (wanted) plan();
    }
  };
  const plan = () => {
    wanted = true;
    if (busy || timer !== null) return;
    timer = timers.set(run, Math.max(0, started + interval - timers.now()));
  };
  plan.cancel = () => {
    if (timer !== null) timers.clear(timer);
    [timer, wanted] = [null, false];
  };
  return plan;
}
