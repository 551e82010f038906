// Small charts in SVG and the heat map in a canvas. Everything is drawn at its real size, and again when it changes.

const SVG = "http://www.w3.org/2000/svg";
const GAP = { top: 6, bottom: 6, left: 4, right: 4 };

/** An element with attributes and text; nothing is ever parsed as HTML. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** One of the small multiples. `spec`: {title, format, bars, series: [{name, values}]}; a value may be null. */
export class Chart {
  constructor(onHover) {
    this.value = make("div", { class: "value" });
    this.key = make("div", { class: "key" });
    this.heading = make("h3");
    this.svg = shape("svg", { role: "img" });
    this.element = make("figure", { class: "chart" }, this.heading, this.value, this.svg, this.key);
    this.hovered = null;
    this.svg.addEventListener("pointermove", (event) => onHover(this.roundAt(event.offsetX)));
    this.svg.addEventListener("pointerdown", (event) => onHover(this.roundAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => onHover(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  show(spec, rounds) {
    this.spec = spec;
    this.rounds = rounds;
    this.heading.textContent = spec.title;
    const named = spec.series.length > 1 ? spec.series : [];
    this.key.replaceChildren(
      ...named.map(({ name }, at) => make("span", {}, make("i", { class: at ? "second" : "first" }), name)),
    );
    this.draw();
  }

  hover(at) {
    this.hovered = at;
    this.draw();
  }

  roundAt(x) {
    const count = this.rounds.length, width = this.svg.clientWidth;
    const share = (x - GAP.left) / Math.max(1, width - GAP.left - GAP.right);
    const at = this.spec.bars ? Math.floor(share * count) : Math.round(share * (count - 1));
    return Math.max(0, Math.min(count - 1, at));
  }

  draw() {
    if (!this.spec || !this.svg.clientWidth) return;
    const { series, format, bars, title } = this.spec, count = this.rounds.length;
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    const known = series.flatMap(({ values }) => values).filter((value) => value !== null);
    const at = this.hovered === null || this.hovered >= count ? count - 1 : this.hovered;
    const texts = series.map(({ values }) => (values[at] === null ? "–" : format(values[at])));
    this.value.replaceChildren(texts.join(" → "), make("small", {}, `round ${this.rounds[at]}`));
    this.svg.setAttribute("aria-label", `${title}, round ${this.rounds[at]}: ${texts.join(", ")}`);
    this.svg.replaceChildren();
    if (!known.length) return;
    let low = bars ? 0 : Math.min(...known), high = Math.max(...known);
    if (high === low) { high += Math.abs(high) * 0.05 || 1; low -= bars ? 0 : Math.abs(low) * 0.05 || 1; }
    const labels = make("canvas").getContext("2d");
    labels.font = "12px system-ui, sans-serif";
    const room = Math.max(labels.measureText(format(high)).width, labels.measureText(format(low)).width) + 12;
    const inner = width - GAP.left - GAP.right - room;
    const y = (value) => GAP.top + ((high - value) / (high - low)) * (height - GAP.top - GAP.bottom);
    const x = (index) => GAP.left + (count > 1 ? (index / (count - 1)) * inner : inner / 2);
    for (const value of [high, low]) {
      this.svg.append(shape("line", { class: "grid", x1: GAP.left, x2: GAP.left + inner, y1: y(value), y2: y(value) }));
      const label = shape("text", { x: width - GAP.right, y: y(value) + 4, "text-anchor": "end" });
      label.textContent = format(value);
      this.svg.append(label);
    }
    this.inner = inner;
    if (bars) this.drawBars(series[0].values, at, inner, y, height);
    else this.drawLines(series, at, x, y, height);
  }

  drawBars(values, at, inner, y, height) {
    const step = inner / values.length, bar = Math.max(1, Math.min(24, step * 0.7));
    values.forEach((value, index) => {
      if (value === null) return;
      const top = Math.min(y(value), height - GAP.bottom - (value > 0 ? 1 : 0));
      this.svg.append(shape("rect", {
        class: "bar", x: GAP.left + step * (index + 0.5) - bar / 2, y: top, width: bar, height: height - GAP.bottom - top,
        rx: Math.min(2, bar / 3), opacity: index === at ? 1 : 0.45,
      }));
    });
  }

  drawLines(series, at, x, y, height) {
    if (this.hovered !== null) {
      this.svg.append(shape("line", { class: "cursor", x1: x(at), x2: x(at), y1: GAP.top, y2: height - GAP.bottom }));
    }
    series.forEach(({ values }, index) => {
      const style = index ? "second" : "first";
      const parts = values.map((value, round) => (value === null ? null : `${x(round).toFixed(1)} ${y(value).toFixed(1)}`));
      const path = parts.reduce((text, part, round) => {
        if (part === null) return text;
        return text + (round > 0 && parts[round - 1] !== null ? "L" : "M") + part;
      }, "");
      this.svg.append(shape("path", { class: `line ${style}`, d: path }));
      if (values[at] !== null) this.svg.append(shape("circle", { class: style, cx: x(at), cy: y(values[at]), r: 3 }));
    });
  }
}

const LABEL = 28, SMALLEST = 5, LARGEST = 26;

/** Layers as rows and experts as columns; a layer with more experts than fit takes several lines. */
export class HeatMap {
  constructor(canvas, output) {
    this.canvas = canvas;
    this.output = output;
    this.chosen = null;
    canvas.addEventListener("pointermove", (event) => this.choose(this.cellAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerdown", (event) => this.choose(this.cellAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("blur", () => this.choose(null));
    canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** `shades` and `texts`: (layer, expert); a shade is 0..1, null for nothing. */
  show(shades, texts, label) {
    this.shades = shades;
    this.texts = texts;
    this.canvas.setAttribute("aria-label", label);
    this.draw();
    this.choose(this.chosen);
  }

  layout() {
    const width = this.canvas.parentElement.clientWidth - LABEL;
    const experts = Math.max(...this.shades.map((row) => row.length));
    const size = Math.max(SMALLEST, Math.min(LARGEST, Math.floor(width / experts)));
    const columns = Math.max(1, Math.min(experts, Math.floor(width / size)));
    const tops = [];
    let top = 0;
    for (const row of this.shades) {
      tops.push(top);
      top += size * Math.max(1, Math.ceil(row.length / columns)) + (columns < experts ? 6 : 0);
    }
    return { size, columns, tops, height: Math.max(top, 16) };
  }

  draw() {
    if (!this.shades?.length) return;
    const { size, columns, tops, height } = this.layout(), width = this.canvas.parentElement.clientWidth;
    const scale = devicePixelRatio || 1, gap = size > 8 ? 2 : 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const [full, empty, muted, text] = ["--first", "--line", "--muted", "--text"].map((name) => style.getPropertyValue(name));
    context.scale(scale, scale);
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    let free = -Infinity;
    this.shades.forEach((row, layer) => {
      const middle = tops[layer] + size / 2;
      if (middle - free >= 14) {
        context.fillStyle = muted;
        context.fillText(layer, LABEL - 8, Math.max(7, middle));
        free = middle;
      }
      row.forEach((shade, expert) => {
        const left = LABEL + size * (expert % columns), top = tops[layer] + size * Math.floor(expert / columns);
        context.globalAlpha = shade ? 0.15 + 0.85 * shade : 0.5;
        context.fillStyle = shade ? full : empty;
        context.fillRect(left, top, size - gap, size - gap);
        context.globalAlpha = 1;
        if (this.chosen && this.chosen[0] === layer && this.chosen[1] === expert) {
          context.strokeStyle = text;
          context.strokeRect(left - 0.5, top - 0.5, size - gap + 1, size - gap + 1);
        }
      });
    });
  }

  cellAt(x, y) {
    if (!this.shades?.length) return null;
    const { size, columns, tops } = this.layout();
    const layer = tops.findLastIndex((top) => y >= top), column = Math.floor((x - LABEL) / size);
    if (layer < 0 || column < 0 || column >= columns) return null;
    const expert = Math.floor((y - tops[layer]) / size) * columns + column;
    return expert < this.shades[layer].length ? [layer, expert] : null;
  }

  move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !this.shades?.length) return;
    event.preventDefault();
    const [layer, expert] = this.chosen ?? [0, -step[1]];
    const next = Math.max(0, Math.min(this.shades.length - 1, layer + step[0]));
    this.choose([next, Math.max(0, Math.min(this.shades[next].length - 1, expert + step[1]))]);
  }

  choose(cell) {
    const exists = cell && cell[1] < (this.shades[cell[0]]?.length ?? 0);
    this.chosen = exists ? cell : null;
    this.output.textContent = exists ? `layer ${cell[0]}, expert ${cell[1]}: ${this.texts[cell[0]][cell[1]]}` : "";
    this.draw();
  }
}
