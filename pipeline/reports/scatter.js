// Draws the scatters of report.html on canvases in place of their pictures: the record that is
// pointed at, and classes that are switched on and off. Ids and names come from outside, so they
// reach the page by textContent alone.
"use strict";
(() => {
  // Hues of matplotlib's tab10, each with a contrast of 3.4 or more to both backgrounds.
  const COLOURS = ["#1f77b4", "#d96a00", "#2a962a", "#d62728", "#9467bd", "#99604f", "#cf5cae",
    "#8a8b00", "#7f7f7f", "#0c93a0"];
  // [corners, radius, radius between two corners, turn in corners]. 7 and 10 have no common
  // divisor, so 70 classes look different; shapes differ where colours are hard to tell apart.
  const SHAPES = [[9, 1, 1, 0], [4, 1.2, .85, .5], [3, 1.35, .68, 0], [4, 1.3, .92, 0],
    [4, 1.6, .45, 0], [4, 1.6, .45, .5], [3, 1.35, .68, .5]];
  const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  const REACH = 24; // Pixels from the pointer to a record.
  const data = JSON.parse(document.getElementById("scatter-data").textContent);
  const { ids, classes, losses, names, sprite } = data;
  const radius = Math.min(6, Math.max(3, 150 / Math.sqrt(ids.length)));
  const off = new Set(); // Classes.
  let lit = null, current = null, isKept = false; // A class, a record, whether a click keeps it.
  const pictures = new Image();
  if (sprite) pictures.src = sprite.url;

  const make = (parent, tag, properties, attributes = {}) => {
    const isShape = tag === "svg" || tag === "polygon";
    const element = isShape ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : Object.assign(document.createElement(tag), properties);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return parent.appendChild(element);
  };
  const colour = (k) => COLOURS[k % COLOURS.length];
  const outline = (k, x, y, size) => {
    const [count, outer, inner, turn] = SHAPES[k % SHAPES.length];
    return Array.from({ length: 2 * count }, (_, i) => {
      const angle = Math.PI * ((2 * turn + i) / count - .5), r = size * (i % 2 ? inner : outer);
      return [x + r * Math.cos(angle), y + r * Math.sin(angle)];
    });
  };
  // Pixels of a coordinate, which is 0 to 10,000; margins hold ticks and names of the axes.
  const along = ({ map, canvas: { clientWidth, clientHeight } }, axis, value) => {
    const before = map.axes.some(Boolean) ? 46 : 8, share = value / 10000;
    return axis ? 8 + (clientHeight - 8 - before) * (1 - share)
      : before + (clientWidth - 8 - before) * share;
  };
  const place = (view, i) => [0, 1].map((axis) => along(view, axis, view.map.points[2 * i + axis]));
  const centre = ({ canvas }) => [canvas.clientWidth / 2, canvas.clientHeight / 2];

  // The nearest visible record within a reach, in a direction if one is given; null for none.
  const nearest = (view, [x, y], reach, direction) => {
    let best = null, least = reach;
    ids.forEach((_, i) => {
      const [dx, dy] = place(view, i).map((at, axis) => at - [x, y][axis]);
      const distance = Math.hypot(dx, dy);
      const ahead = direction && dx * direction[0] + dy * direction[1];
      const isAhead = !direction || (ahead > 0 && 1.5 * ahead > distance);
      if (distance < least && isAhead && !off.has(classes[i])) [best, least] = [i, distance];
    });
    return best;
  };

  const draw = (view) => {
    const { map, canvas } = view, { clientWidth: width, clientHeight: height } = canvas;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
    canvas.width = width * devicePixelRatio; // This clears the canvas, too.
    canvas.height = height * devicePixelRatio;
    context.scale(devicePixelRatio, devicePixelRatio);
    context.font = `12px ${style.fontFamily}`;
    context.textAlign = "center";
    const [left, right] = [along(view, 0, 0), along(view, 0, 10000)];
    const [bottom, top] = [along(view, 1, 0), along(view, 1, 10000)];
    context.strokeStyle = style.getPropertyValue("--line");
    context.strokeRect(left, top, right - left, bottom - top);
    context.fillStyle = style.color;
    map.ticks[0].forEach(([at, text]) => context.fillText(text, along(view, 0, at), bottom + 16));
    context.fillText(map.axes[0], (left + right) / 2, height - 8);
    context.rotate(-Math.PI / 2); // From here on, x goes up.
    map.ticks[1].forEach(([at, text]) => context.fillText(text, -along(view, 1, at), left - 6));
    context.fillText(map.axes[1], -(top + bottom) / 2, 14);
    context.rotate(Math.PI / 2);
    for (const isFront of lit === null ? [true] : [false, true]) {
      context.globalAlpha = isFront ? .8 : .12;
      classes.forEach((k, i) => {
        if (off.has(k) || isFront !== (lit === null || k === lit)) return;
        context.beginPath();
        outline(k, ...place(view, i), radius).forEach((corner) => context.lineTo(...corner));
        context.fillStyle = colour(k);
        context.fill();
      });
    }
    if (current === null) return;
    context.globalAlpha = 1;
    context.strokeStyle = style.color;
    context.lineWidth = 2;
    context.beginPath();
    context.arc(...place(view, current), radius + 4, 0, 7);
    context.stroke();
  };

  const describe = ({ canvas, card }, i, [x, y]) => {
    card.replaceChildren();
    if (sprite && !sprite.missing.includes(i)) {
      const { columns, width, height } = sprite;
      const [left, top] = [i % columns * width, Math.floor(i / columns) * height];
      const picture = make(card, "canvas", { width, height });
      picture.style.width = `${width * 96 / Math.max(width, height)}px`;
      picture.getContext("2d").drawImage(pictures, left, top, width, height, 0, 0, width, height);
    }
    make(card, "b", { textContent: ids[i] });
    make(card, "div", { textContent: names[classes[i]] });
    if (losses) make(card, "div", { textContent: `reconstruction_loss ${losses[i]}` });
    card.hidden = false;
    card.style.pointerEvents = isKept ? "auto" : "none"; // Its text can be copied.
    const room = canvas.clientHeight - card.offsetHeight;
    card.style.left = `${x < canvas.clientWidth / 2 ? x + 12 : x - 12 - card.offsetWidth}px`;
    card.style.top = `${Math.max(0, Math.min(y - card.offsetHeight / 2, room))}px`;
  };

  const views = [];
  const show = (view, record, keep = false) => {
    [current, isKept] = [record, keep && record !== null];
    views.forEach((other) => { other.card.hidden = true; });
    if (record !== null) describe(view, record, place(view, record));
    views.forEach(draw);
  };

  document.querySelectorAll("figure[data-map]").forEach((figure) => {
    const box = document.createElement("div"), picture = figure.querySelector("picture");
    box.className = "map";
    const alt = figure.querySelector("img").alt;
    const label = `${alt}. Arrow keys move from record to record.`;
    const canvas = make(box, "canvas", { tabIndex: 0 }, { role: "application", "aria-label": label });
    const card = make(box, "div", { className: "card", hidden: true }, { "aria-live": "polite" });
    const view = { map: data.maps[figure.dataset.map], canvas, card };
    const at = ({ offsetX, offsetY }) => nearest(view, [offsetX, offsetY], REACH);
    canvas.onpointermove = (event) => {
      const record = isKept ? current : at(event);
      if (record !== current) show(view, record);
    };
    canvas.onclick = (event) => show(view, at(event), true);
    canvas.onpointerleave = canvas.onblur = () => { if (!isKept) show(view, null); };
    canvas.onfocus = () => {
      if (canvas.matches(":focus-visible")) show(view, nearest(view, centre(view), Infinity));
    };
    canvas.onkeydown = (event) => {
      if (event.key === "Escape") show(view, null);
      if (!KEYS[event.key]) return;
      event.preventDefault();
      const from = current === null ? centre(view) : place(view, current);
      const next = nearest(view, from, Infinity, KEYS[event.key]);
      if (next !== null) show(view, next);
    };
    views.push(view);
    picture.before(box);
    picture.hidden = true;
    new ResizeObserver(() => draw(view)).observe(canvas);
  });
  matchMedia("(prefers-color-scheme: dark)").onchange = () => views.forEach(draw);

  const legend = document.getElementById("scatter-legend");
  legend.hidden = false;
  const group = legend.querySelector("[role=group]");
  const press = (change) => {
    change();
    lit = null;
    group.querySelectorAll("[aria-pressed]").forEach((button, k) => {
      button.setAttribute("aria-pressed", !off.has(k));
    });
    show(views[0], null);
  };
  const light = (k) => { lit = off.has(k) ? null : k; views.forEach(draw); };
  if (names.length < 2) return;
  make(group, "button", { textContent: "all", onclick: () => press(() => off.clear()) });
  const none = () => names.forEach((_, k) => off.add(k));
  make(group, "button", { textContent: "none", onclick: () => press(none) });
  names.forEach((name, k) => {
    const button = make(group, "button", { title: name }, { "aria-pressed": true });
    const shape = make(button, "svg", {}, { viewBox: "-8 -8 16 16", "aria-hidden": true });
    make(shape, "polygon", {}, { points: outline(k, 0, 0, 5).join(" "), fill: colour(k) });
    make(button, "span", { textContent: name });
    button.onclick = () => press(() => off.delete(k) || off.add(k));
    button.onmouseenter = () => light(k);
    button.onfocus = () => { if (button.matches(":focus-visible")) light(k); };
    button.onmouseleave = button.onblur = () => light(null);
  });
})();
