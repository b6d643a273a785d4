// Draws losses over optimizer steps, with the same values as a table.
import { h, svg, table } from "./dom.js";

const WIDTH = 640, HEIGHT = 300, LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 40;
const TICKS = 5;

function niceStep(span) {
  const rough = span / TICKS || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}

function axis(values, floor) {
  const least = Math.min(...values), most = Math.max(...values);
  const step = Math.max(niceStep(most - least), floor);
  const from = Math.floor(least / step) * step, to = Math.max(Math.ceil(most / step) * step, from + step);
  const ticks = Array.from({ length: Math.round((to - from) / step) + 1 }, (_, index) => from + index * step);
  return { from, to, ticks, digits: Math.max(0, -Math.floor(Math.log10(step))) };
}

const described = ({ name, training, heldOut }) => [["training", training], ["held-out", heldOut]]
  .filter(([, points]) => points.length)
  .map(([kind, points]) => `${name}, ${kind} loss: ${points[0][1]} at step ${points[0][0]}, ${points.at(-1)[1]} at step ${points.at(-1)[0]}`);

export function curves(series) {
  const drawn = series.filter((each) => each.training.length + each.heldOut.length);
  const all = drawn.flatMap((each) => [...each.training, ...each.heldOut]);
  if (!all.length) return h("p", {}, "No losses yet.");
  const steps = axis([0, ...all.map(([step]) => step)], 1), losses = axis(all.map(([, loss]) => loss), 1e-6);
  const x = (step) => LEFT + ((step - steps.from) / (steps.to - steps.from)) * (WIDTH - LEFT - RIGHT);
  const y = (loss) => HEIGHT - BOTTOM - ((loss - losses.from) / (losses.to - losses.from)) * (HEIGHT - TOP - BOTTOM);
  const path = (points) => points.map(([step, loss], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  const grid = [
    ...steps.ticks.map((step) => svg("text", { x: x(step), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, step.toFixed(steps.digits))),
    ...losses.ticks.map((loss) => [
      svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(loss), y2: y(loss), class: "grid" }),
      svg("text", { x: LEFT - 6, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(losses.digits)),
    ]),
    svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "Optimizer step"),
  ];
  const lines = drawn.map((each, index) => svg("g", { class: `series s${index % 6}` },
    svg("path", { d: path(each.training), class: "training" }),
    svg("path", { d: path(each.heldOut), class: "held-out" }),
    each.heldOut.map(([step, loss]) => svg("circle", { cx: x(step), cy: y(loss), r: 3.5 }))));
  const label = `Losses. ${drawn.flatMap(described).join(". ")}.`;
  const legend = drawn.map((each, index) => h("li", { class: `s${index % 6}` }, each.name));
  const rows = drawn.flatMap((each) => [...new Set([...each.training, ...each.heldOut].map(([step]) => step))].sort((a, b) => a - b)
    .map((step) => [each.name, String(step), ...[each.training, each.heldOut].map((points) => String(points.find((point) => point[0] === step)?.[1] ?? "–"))]));
  return h("figure", {},
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, grid, lines),
    h("figcaption", {}, h("ul", { class: "legend" }, legend), "Line: training loss. Dots: loss on held-out rows."),
    h("details", { id: "values" }, h("summary", {}, "The values as a table"),
      table("Losses by optimizer step", ["Job", "Step", "Training loss", "Held-out loss"], rows)));
}
