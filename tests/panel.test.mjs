// The panel's pure functions and its watch of the server; run by test_panel.py.
import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";
import * as f from "./panel/format.js";
import { TEXTS, texts } from "./panel/text.js";
import { Watch } from "./panel/watch.js";

test("times", () => {
  assert.deepEqual([0, 5.4, 74.1, 599.6, 3600, 36125].map(f.duration), ["0:00", "0:05", "1:14", "10:00", "1:00:00", "10:02:05"]);
  assert.deepEqual([null, undefined, NaN, -1, Infinity].map(f.duration), ["", "", "", "", ""]);
});

test("figures", () => {
  assert.deepEqual([0.712345, 12.3456, -0.5, 0, 43210, 6.56e-9, -2e6, null, NaN].map((v) => f.figure(v)),
    ["0.7123", "12.35", "−0.5", "0", "43210", "6.6e-9", "−2.0e6", "–", "–"]);
  assert.equal(f.figure(0.02261, 2), "0.023");
  assert.deepEqual([1.2, -0.851, 0, null].map((v) => f.signed(v)), ["+1.20", "−0.85", "0.00", "–"]);
  assert.equal(f.signed(0.04712, null), "+0.04712");
});

test("ranges hold their data", () => {
  assert.deepEqual(f.xRange(1, 50), [1, 50]);
  assert.deepEqual(f.xRange(30, 1000), [1, 30]);
  assert.deepEqual(f.xRange(300, 1000), [1, 1000]);
  assert.deepEqual(f.xRange(0, 0), [1, 2]);
  const [low, high] = f.yRange([[0.2, null, 0.4], [NaN, 0.1, 0.5]]);
  assert.ok(low < 0.1 && low > 0 && high > 0.5 && high < 0.6);
  assert.equal(f.yRange([[0.2, 0.4]], 0)[0], 0);
  assert.deepEqual(f.yRange([[null], []]), [0, 1]);
  const [under, over] = f.yRange([[3, 3]]);
  assert.ok(under < 3 && over > 3);
});

test("the band is mean ± spread, with gaps where either is unknown", () => {
  assert.deepEqual(f.band([1, 2, null, 4], [0.5, 1, 1, null]), [[0.5, 1, null, null], [1.5, 3, null, null]]);
});

test("which run is shown first", () => {
  const runs = ["other", "a-12", "a", "a-b", "ab"].map((name) => ({ name }));
  const mine = (node) => node === "10";
  assert.equal(f.chooseRun({ run: "x", node: "10" }, runs, mine, "a"), "x");
  assert.equal(f.chooseRun({ run: "x", node: "9" }, runs, mine, "a"), "a-12");
  assert.equal(f.chooseRun(null, runs.slice(2), mine, "a"), "a");
  assert.equal(f.chooseRun(null, runs, mine, "zzz"), null);
  assert.equal(f.chooseRun(null, runs, mine, undefined), null);
  assert.ok(f.isNode(10, "10") && f.isNode("3:10", 10, true) && !f.isNode("3:10", 10) && !f.isNode("110", 10, true) && !f.isNode(undefined, 10));
});

test("an evaluation's figures", () => {
  const found = { before: 0.2478817, after: 0.295, gain: 0.0471183, ci95: [0.04, 0.05], n: 160 };
  assert.deepEqual(f.evaluation(found), { before: "0.2479", after: "0.295", gain: "+0.04712 ± 0.005", sure: 1 });
  assert.equal(f.evaluation({ ...found, ci95: [-0.1, 0.2] }).sure, 0);
  assert.deepEqual(f.evaluation({ ...found, gain: -0.1, ci95: null }).gain, "−0.1");
});

test("pictures fill their box, and scroll where they would be too small", () => {
  const gap = 6, below = 15;
  for (const [width, height, count] of [[360, 200, 8], [360, 400, 4], [700, 300, 12], [360, 300, 1]]) {
    const [tile, columns] = f.tiling(width, height, count, below, gap, 20, 1000);
    const rows = Math.ceil(count / columns);
    assert.ok(tile > 50 && rows * (tile + below) + (rows - 1) * gap <= height && columns * tile + (columns - 1) * gap <= width);
  }
  assert.deepEqual(f.tiling(408, 260, 4, below, gap), [97, 4]); // one row, though two of two were a little larger
  assert.deepEqual(f.tiling(360, 100, 32, below, gap, 68), [68, 4]);
});

/** Timers that move when they are told to. */
function clock() {
  const queue = [];
  const timers = { time: 0, now: () => timers.time, set: (work, delay) => queue.push({ at: timers.time + delay, work }), clear: () => queue.splice(0) };
  timers.to = async (time) => {
    for (;;) {
      await new Promise(setImmediate);
      const next = queue.findIndex((entry) => entry.at <= time);
      if (next < 0) break;
      const [entry] = queue.splice(next, 1);
      timers.time = Math.max(timers.time, entry.at);
      entry.work();
    }
    timers.time = time;
  };
  return timers;
}

test("calls are paced, and the last is never lost", async () => {
  const timers = clock(), starts = [];
  const call = f.paced(async () => starts.push(timers.now()), 500, timers);
  for (let time = 0; time <= 2000; time += 50) {
    await timers.to(time);
    call();
  }
  await timers.to(5000);
  assert.deepEqual(starts, [0, 500, 1000, 1500, 2000, 2500]);
});

test("never two at once, and one more after a call in between", async () => {
  const timers = clock(), gates = [];
  const call = f.paced(() => new Promise((resolve) => gates.push(resolve)), 500, timers);
  call();
  await timers.to(100);
  call();
  call();
  await timers.to(5000);
  assert.equal(gates.length, 1);
  gates[0]();
  await timers.to(5001);
  assert.equal(gates.length, 2);
});

/** A server with runs, whose requests are counted; `gone` makes it unreachable. */
function stub(runs, active = null) {
  const ask = { runs, active, gone: false, asked: [] };
  const answer = async (what, value) => {
    ask.asked.push(what);
    if (ask.gone) throw new TypeError("fetch failed");
    if (value === undefined) throw Object.assign(new Error("no run"), { status: 404 });
    return value;
  };
  return Object.assign(ask, {
    list: () => answer("list", { runs: ask.runs, active: ask.active }),
    run: (name) => answer(name, ask.runs.find((run) => run.name === name)),
    stop: (name) => answer(`stop ${name}`, {}),
  });
}

async function watched(ask, runName, check) {
  const timers = clock();
  const watch = new Watch(ask, (node) => node === "10", () => runName, () => {}, timers);
  watch.start();
  try {
    await timers.to(1000);
    await check(watch, timers);
  } finally {
    watch.end();
  }
}

const A = { name: "a", state: "finished" }, B = { name: "b", state: "running" };

test("a page that is loaded in mid-run shows that run", () =>
  watched(stub([A, B], { run: "b", node: "10" }), "a", async (watch) => {
    assert.equal(watch.shown, "b");
    assert.equal(watch.run, B);
    assert.equal(watch.note, null);
  }));

test("what is said below a run that this server does not train", async () => {
  const note = (run) => watched(stub([run]), run.name, async (watch) => assert.deepEqual(watch.note, run.note));
  await note({ ...B, note: { key: "elsewhere" } });
  await note({ name: "c", state: "interrupted", kept: 40, note: { key: "cut_off", kept: 40 } });
  await note({ name: "c", state: "interrupted", kept: 0, note: { key: "cut_off_at_once", kept: 0 } });
  await note({ name: "c", state: "stopped", stopped_by: "why", note: { key: "stopped_by", reason: "why" } });
  await note({ ...A, note: null });
});

test("the user's choice stays through this run's events, until the next run begins", () => {
  const ask = stub([A, B, { name: "c", state: "running" }], { run: "b", node: "10" });
  return watched(ask, "b", async (watch, timers) => {
    watch.choose("a");
    watch.told({ run: "b", node: "10", state: "running" });
    await timers.to(3000);
    assert.equal(watch.run, A);
    watch.told({ run: "b", node: "10", state: "finished" });
    await timers.to(6000);
    assert.equal(watch.run, A);
    ask.active = { run: "c", node: "10" };
    watch.told({ run: "c", node: "10", state: "running" });
    await timers.to(9000);
    assert.equal(watch.run?.name, "c");
  });
});

test("another node's run is not this one's", () => {
  const ask = stub([A, B]);
  return watched(ask, "a", async (watch, timers) => {
    const before = ask.asked.length;
    watch.told({ run: "b", node: "11", state: "running" });
    await timers.to(3000);
    assert.equal(watch.shown, "a");
    assert.equal(ask.asked.length, before);
  });
});

test("the last event's state is fetched however fast they come, at most two requests a second", () => {
  const ask = stub([{ name: "b", state: "running", iteration: 0 }], { run: "b", node: "10" });
  return watched(ask, "b", async (watch, timers) => {
    const before = ask.asked.length;
    for (let i = 1; i <= 100; i++) {
      ask.runs = [{ name: "b", state: i < 100 ? "running" : "finished", iteration: i }];
      watch.told({ run: "b", node: "10", state: ask.runs[0].state, iteration: i });
      await timers.to(1000 + 30 * i);
    }
    await timers.to(8000);
    assert.deepEqual([watch.run.iteration, watch.run.state], [100, "finished"]);
    assert.ok(ask.asked.length - before <= 9, String(ask.asked.length - before));
  });
});

test("a server that is gone is told, and found again", () => {
  const ask = stub([B], { run: "b", node: "10" });
  return watched(ask, "b", async (watch, timers) => {
    ask.gone = true;
    watch.refresh();
    await timers.to(3000);
    assert.deepEqual(watch.note, { key: "silent" });
    assert.equal(watch.run, B); // what was known stays
    ask.gone = false;
    watch.poll();
    await timers.to(6000);
    assert.equal(watch.note, null);
  });
});

test("stop asks the server, and shows it at once", () => {
  const ask = stub([B], { run: "b", node: "10" });
  return watched(ask, "b", async (watch) => {
    await watch.stop();
    assert.ok(ask.asked.includes("stop b"));
    assert.equal(watch.run.state, "stopping");
  });
});

test("nothing to show, and a run that cannot be read", async () => {
  await watched(stub([]), "a", async (watch) => assert.deepEqual([watch.ready, watch.shown, watch.run, watch.error], [true, null, null, null]));
  const ask = stub([A]);
  ask.run = async () => { throw Object.assign(new Error("no run 'a'"), { status: 404 }); };
  await watched(ask, "a", async (watch) => {
    assert.equal(watch.run, null);
    assert.deepEqual(watch.note, { key: "answers", status: 404, message: "no run 'a'" });
  });
});

// -- words ------------------------------------------------------------------------------------------------------------
test("every language says the same, with the same values", () => {
  const places = (text) => (text.match(/\{\w+\}/g) ?? []).sort();
  for (const [language, words] of Object.entries(TEXTS)) {
    assert.deepEqual(Object.keys(words), Object.keys(TEXTS.en), language);
    for (const [key, text] of Object.entries(words)) {
      assert.ok(text.trim(), `${language}.${key}`);
      assert.deepEqual(places(text), places(TEXTS.en[key]), `${language}.${key}`);
    }
  }
  for (const [key, text] of Object.entries(TEXTS.zh)) assert.match(text, /[\u4e00-\u9fff\uff00-\uffef]/, key);
});

test("a language is taken by its name, and English for others", () => {
  assert.equal(texts("zh")("left", { time: "1:05" }), "剩余 1:05");
  for (const other of ["en", "fr", undefined]) assert.equal(texts(other)("left", { time: "1:05" }), "1:05 left");
  const run = { name: "a {count}", state: "running", iteration: 2 };
  assert.equal(f.runLabel(run, texts("en")), "a {count} (running, 2 iterations)"); // what a value holds is no place
  assert.equal(f.runLabel({ ...run, iteration: 1 }, texts("en")), "a {count} (running, 1 iteration)");
  assert.equal(f.runLabel({ name: "b", state: "else", iteration: 0 }, texts("zh")), "b（未知）");
});

/** The string literals of a script, a template's code left out. */
function literals(source) {
  const found = [];
  const plain = source.replace(/\/\*[^]*?\*\//g, "").replace(/(^|\s)\/\/.*$/gm, "");
  for (const [, quoted, template] of plain.matchAll(/"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\]|\\.)*)`/g)) found.push(quoted ?? template.replace(/\$\{[^}]*\}/g, ""));
  return found;
}

const ENGLISH = /^[A-Z][a-z]+( |$|…)|[a-z]{2,} [a-z]{2,}|…/; // a capitalised word, or two words beside each other
const CODE = [/^10px system-ui/, /^Content-/, /^DanceGRPO/, /^Comfy\./];

test("no words are written outside of text.js", () => {
  const said = ["Reward", "Open a run…", "The server does not answer; trying again.", "iteration then value", "Iterations done"];
  for (const words of said) assert.match(words, ENGLISH); // the net holds what was there once
  const scripts = readdirSync("panel").filter((name) => name.endsWith(".js") && name !== "text.js");
  assert.ok(scripts.length >= 5);
  for (const name of scripts) {
    const source = readFileSync(`panel/${name}`, "utf8");
    const found = literals(source);
    assert.ok(found.length, name);
    assert.deepEqual(found.filter((text) => ENGLISH.test(text) && !CODE.some((code) => code.test(text))), [], name);
    for (const [, key] of source.matchAll(/\btext\("(\w+)"/g)) assert.ok(key in TEXTS.en, key);
  }
});
