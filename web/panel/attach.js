// Puts the panel on a Loop End node, as a DOM widget that is never saved with the graph.
import { isNode } from "./format.js";
import { texts } from "./text.js";
import { View } from "./view.js";
import { Watch, server } from "./watch.js";

const LEAST = { width: 300, height: 440 }; // of the panel; the node adds its margins, its title and its slots
const USUAL = [420, 660]; // of a new node
const ENDS = ["execution_success", "execution_error", "execution_interrupted"]; // Evaluate writes its figures after the run
const START = "DanceGRPOLoopStart";
const LANGUAGE = "Comfy.Locale"; // the frontend's setting

export function attach(node, app, api) {
  styles();
  const watch = new Watch(
    server((path, options) => api.fetchApi(path, options)),
    (told) => isNode(told, node.id, !!node.graph && node.graph !== (app.rootGraph ?? app.graph)),
    () => runName(node),
    () => view.update(watch),
  );
  const view = new View({
    choose: (name) => watch.choose(name),
    stop: () => watch.stop(),
    opened: () => watch.refreshAll(),
    refresh: () => watch.refresh(),
    // a restarted run uses its names again: the score makes another address of another picture
    pictureURL: (run, { file, score }) => api.apiURL(`/dancegrpo/runs/${encodeURIComponent(run)}/live/${encodeURIComponent(file)}?score=${score}`),
  }, texts(app.extensionManager?.setting?.get(LANGUAGE)));
  const widget = node.addDOMWidget("live_panel", "dancegrpo_panel", view.root, { serialize: false, hideOnZoom: false, getMinHeight: () => LEAST.height });
  widget.serialize = false; // options.serialize keeps it out of the prompt, this out of the saved graph
  widget.computeLayoutSize = () => ({ minHeight: LEAST.height, minWidth: LEAST.width });
  node.setSize([Math.max(node.size[0], USUAL[0]), Math.max(node.size[1], USUAL[1])]);
  passOn(view.root, app);

  const events = {
    "dancegrpo.run": (event) => watch.told(event.detail ?? {}),
    reconnected: () => watch.refreshAll(),
    ...Object.fromEntries(ENDS.map((name) => [name, () => watch.refreshAll()])),
  };
  const visible = () => document.hidden || watch.refreshAll();
  const spoken = (event) => view.translate(texts(event.detail.value), watch);
  let listening = false;
  const listen = (on) => {
    if (on === listening) return;
    listening = on;
    for (const [name, heard] of Object.entries(events)) on ? api.addEventListener(name, heard) : api.removeEventListener(name, heard);
    on ? document.addEventListener("visibilitychange", visible) : document.removeEventListener("visibilitychange", visible);
    on ? app.ui.settings.addEventListener(`${LANGUAGE}.change`, spoken) : app.ui.settings.removeEventListener(`${LANGUAGE}.change`, spoken);
    on ? watch.start() : watch.end();
  };
  after(node, "onAdded", () => listen(true));
  after(node, "onRemoved", () => listen(false));
  after(node, "onConfigure", () => node.setSize(node.size.map((size, i) => Math.max(size, node.computeSize()[i])))); // graphs from before the panel
  if (node.graph) listen(true);
}

/** Calls `more` after the node's own method. */
function after(node, name, more) {
  const own = node[name];
  node[name] = function (...inputs) {
    const result = own?.apply(this, inputs);
    more();
    return result;
  };
}

/** Loop Start's run_name, found upstream of the node; undefined where there is none. */
function runName(node) {
  const [seen, queue] = [new Set(), [node]];
  while (queue.length) {
    const next = queue.shift();
    if (!next || seen.has(next)) continue;
    seen.add(next);
    if (next.comfyClass === START) return next.widgets?.find((widget) => widget.name === "run_name")?.value;
    for (let i = 0; i < (next.inputs?.length ?? 0); i++) queue.push(next.getInputNode(i));
  }
  return undefined;
}

/** The wheel zooms the canvas and the middle button drags it, over the panel as beside it. */
function passOn(root, app) {
  root.addEventListener("wheel", (event) => {
    const box = event.target.closest?.(".dancegrpo-tiles");
    const scrolls = box && box.scrollHeight > box.clientHeight && !event.ctrlKey && !event.metaKey;
    if (scrolls) event.stopPropagation();
    else if (root.closest(".dom-widget")) {
      event.preventDefault();
      app.canvas?.processMouseWheel?.(event);
    }
  }, { passive: false });
  const middle = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  for (const [name, method] of Object.entries(middle)) {
    root.addEventListener(name, (event) => {
      const isMiddle = name === "pointermove" ? (event.buttons & 4) === 4 : event.button === 1;
      if (isMiddle && root.closest(".dom-widget")) app.canvas?.[method]?.(event);
    });
  }
}

function styles() {
  for (const path of ["../vendor/uplot/uPlot.min.css", "./panel.css"]) {
    const href = new URL(path, import.meta.url).href;
    if ([...document.styleSheets].some((sheet) => sheet.href === href) || document.querySelector(`link[href="${CSS.escape(href)}"]`)) continue;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
  }
}
