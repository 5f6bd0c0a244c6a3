// The curves: one uPlot each, drawn in the theme's colours, with a cursor that all of a panel's charts share.
import uPlot from "../vendor/uplot/uPlot.esm.js";
import { figure } from "./format.js";

const FONT = "10px system-ui, sans-serif";

/** A line, with a band around it where `spread` is true. `colours()` gives {line, band, grid, text} as CSS colours. */
export class Chart {
  constructor(box, { spread, yRange, rows, colours, hover }) {
    [this.box, this.spread, this.yRange, this.xMax] = [box, spread, yRange, [1, 2]];
    this.data = [[], []];
    const axis = { stroke: () => colours().text, font: FONT, grid: { stroke: () => colours().grid, width: 1 }, ticks: { show: false } };
    const edge = { stroke: "transparent", width: 0, points: { show: false } };
    const dot = (_, series) => (series === 1 ? colours().line : "transparent");
    const line = { stroke: () => colours().line, width: 1.5, points: { show: () => this.data[0].length < 3, size: 5, fill: () => colours().line } };
    this.options = {
      legend: { show: false },
      padding: [6, 8, 0, 0],
      scales: { x: { time: false, range: () => this.xMax }, y: { range: () => this.yRange(this.data) } },
      series: [{}, line, ...(spread ? [edge, edge] : [])],
      bands: spread ? [{ series: [3, 2], fill: () => colours().band }] : [],
      axes: [
        { ...axis, size: 16, gap: 2, space: 45, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 500000] },
        { ...axis, size: 44, gap: 4, space: rows, values: (_, splits) => splits.map((v) => (v === 0 ? "0" : figure(Number(v.toPrecision(12))))) },
      ],
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 6, fill: dot, stroke: dot },
                bind: { mousemove: none, mousedown: none, mouseup: none, mouseenter: none, mouseleave: none, dblclick: none, click: none } },
    };
    this.hover = hover;
    this.plot = null;
    this.seen = new ResizeObserver(() => this.fit());
    this.seen.observe(box);
  }

  /** columns: x, line, and the band's lower and upper edge. */
  show(columns, x) {
    [this.data, this.xMax] = [columns, x];
    if (this.plot) this.plot.setData(columns);
    else this.fit();
  }

  /** To the box's size in its own pixels, whatever the canvas's zoom. */
  fit() {
    const { clientWidth: width, clientHeight: height } = this.box;
    if (width < 40 || height < 30) return; // hidden
    if (!this.plot) {
      this.plot = new uPlot({ ...this.options, width, height }, this.data, this.box);
      const over = this.plot.over;
      // not uPlot's own mouse: it takes screen pixels for its own, and the canvas is zoomed
      over.addEventListener("pointermove", (event) => {
        const seen = over.getBoundingClientRect();
        this.hover(this.plot.posToIdx(((event.clientX - seen.left) * over.offsetWidth) / seen.width));
      });
      over.addEventListener("pointerleave", () => this.hover(null));
    } else if (this.plot.width !== width || this.plot.height !== height) {
      this.plot.setSize({ width, height });
    }
  }

  /** Marks a point of the curve by its place, or none for null. */
  mark(index) {
    const x = index === null ? undefined : this.data[0][index];
    this.plot?.setCursor(x === undefined ? { left: -10, top: -10 } : { left: this.plot.valToPos(x, "x"), top: 1 }, false);
  }

  redraw() {
    this.plot?.redraw(false);
  }

  end() {
    this.seen.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }
}

function none() {
  return null;
}
