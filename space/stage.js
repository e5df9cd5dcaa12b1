// Two growing mp4 files side by side, and charts of their chunks. `props.value` is the whole state that `Studio.roll_out`
// yields, with the URLs of the files.

const SIDES = ["left", "right"];
const find = (selector, inside = element) => inside.querySelector(selector);
const players = SIDES.map((side) => new Player(find(`[data-side=${side}] video`)));
let state = {}, run = null, isPaused = false;

// A growing file

function Player(video) {
  const Source = window.ManagedMediaSource || window.MediaSource;
  let source, buffer, held, known, address, isOver, generation = 0;

  this.video = video;
  this.waits = 0; // number of times that playback reached the end of the buffer
  video.addEventListener("waiting", () => {
    const isShort = this.end() - video.currentTime < 0.1; // otherwise the browser is busy or has not started
    if (isShort && video.currentTime > 0 && !video.seeking && !video.ended) this.waits += 1;
  });

  this.begin = (url) => {
    generation += 1;
    [source, buffer, held, known, address, isOver] = [null, null, 0, 0, url, false];
    this.waits = 0;
    video.pause();
    video.loop = false;
    video.removeAttribute("src");
    video.load();
  };

  this.grow = async (bytes, over) => {
    [known, isOver] = [bytes, over];
    if (!Source) { // an old phone plays the file when it is complete
      if (over && !video.src) video.src = address;
      return;
    }
    if (this.busy === generation) return;
    const mine = (this.busy = generation);
    try {
      while (held < known && mine === generation) {
        const answer = await fetch(address, { headers: { Range: `bytes=${held}-${known - 1}` }, cache: "no-store" });
        if (!answer.ok) break;
        let data = await answer.arrayBuffer();
        if (answer.status === 200) data = data.slice(held);
        if (mine !== generation) return;
        if (!source) await open(codec(new Uint8Array(data)));
        buffer.appendBuffer(data);
        await new Promise((done) => buffer.addEventListener("updateend", done, { once: true }));
        held += data.byteLength;
      }
      if (isOver && held === known && source?.readyState === "open") source.endOfStream();
    } finally {
      if (this.busy === mine) this.busy = null;
    }
  };

  const open = async (type) => {
    source = new Source();
    video.disableRemotePlayback = true; // required by ManagedMediaSource
    const opened = new Promise((done) => source.addEventListener("sourceopen", done, { once: true }));
    video.src = URL.createObjectURL(source);
    await opened;
    URL.revokeObjectURL(video.src);
    buffer = source.addSourceBuffer(type);
  };

  this.end = () => (video.buffered.length ? video.buffered.end(video.buffered.length - 1) : 0);
}

function codec(bytes) { // profile, constraints and level stand in the box "avcC"
  for (let at = 4; at < bytes.length - 8; at++) {
    if (bytes[at] === 97 && bytes[at + 1] === 118 && bytes[at + 2] === 99 && bytes[at + 3] === 67) {
      const hex = [5, 6, 7].map((offset) => bytes[at + offset].toString(16).padStart(2, "0")).join("");
      return `video/mp4; codecs="avc1.${hex}"`;
    }
  }
  throw new Error("The file has no h264 in it.");
}

// Buffer first, then play. While chunks are made, the speed is proportional to the buffer, so that the buffer shrinks
// towards three chunks and never to zero.

const isRunning = () => state.status === "running";

function pace() {
  if (!state.made) return tell(1);
  const [first, second] = players.map((player) => player.video);
  const ahead = Math.min(...players.map((player) => player.end())) - first.currentTime;
  const chunk = state.num_frames / state.made / state.fps;
  let speed = 1;
  if (isRunning()) {
    const made = state.rate / state.fps; // seconds of video in a second
    speed = Math.min(1, Math.max(0.0625, (made * ahead) / (3 * chunk)));
  }
  const begins = !isRunning() || ahead >= 2 * chunk || state.made === state.planned;
  players.forEach((player, number) => {
    const lag = number ? first.currentTime - second.currentTime : 0;
    player.video.playbackRate = Math.min(2, Math.max(0.0625, speed * (1 + 2 * lag)));
    if (Math.abs(lag) > 0.5 && !second.seeking) second.currentTime = first.currentTime;
    if (player.video.paused && begins && !isPaused && player.end() > 0 && !player.video.ended) player.video.play().catch(() => {});
  });
  if (players.every((player) => player.video.ended) && !isPaused) seek(0); // again from the start
  const time = find(".time");
  time.max = Math.max(...players.map((player) => player.end()));
  if (!time.matches(":active")) time.value = first.currentTime;
  tell(speed);
}

function seek(seconds) {
  players.forEach(({ video }) => { video.currentTime = Math.max(0, Math.min(seconds, video.duration || seconds)); });
}

// The current chunk

function shownChunk() {
  let frame = players[0].video.currentTime * state.fps + 0.01;
  const chunks = state.sides?.[0].chunks ?? [];
  const index = chunks.findIndex((chunk) => (frame -= chunk.frames) < 0);
  return index < 0 ? chunks.length - 1 : index;
}

function mark() {
  const index = shownChunk(), wanted = find(".outline").checked;
  SIDES.forEach((side, number) => {
    const chunk = state.sides?.[number].chunks[index], frame = find(`[data-side=${side}] .frame`);
    frame.classList.toggle("trimmed", chunk?.event === "trimmed");
    frame.classList.toggle("quarantined", chunk?.event === "quarantined");
    const [rows, columns] = state.grid ?? [1, 1], svg = find(".marks", frame);
    const tokens = wanted && chunk ? chunk.tokens : [];
    const key = `${state.run}/${index}/${tokens.length}`;
    if (svg.dataset.key === key) return;
    svg.dataset.key = key;
    svg.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.replaceChildren(...tokens.flatMap((token) => [0.04, 0.1].map((inset, ring) => draw("rect", {
      x: token % columns + inset, y: Math.floor(token / columns) + inset,
      width: 1 - 2 * inset, height: 1 - 2 * inset, class: ring ? "inner" : "outer",
    }))));
  });
  element.querySelectorAll(".chart svg").forEach((svg) => {
    const now = find(".now", svg);
    if (now && svg.place) ["x1", "x2"].forEach((end) => now.setAttribute(end, svg.place(index)));
  });
  const prompts = state.prompts ?? [];
  find(".prompt").textContent = prompts.filter(([at]) => at <= index).pop()?.[1] ?? prompts[0]?.[1] ?? "";
}

function tell(speed) {
  if (!state.status) return;
  const parts = [`chunk ${state.made} of ${state.planned}`];
  if (state.rate && !state.is_example) parts.push(`${state.rate.toFixed(1)} frames/s made`);
  if (isRunning()) {
    const begun = players[0].video.currentTime > 0;
    parts.push(begun ? `playing at ${speed.toFixed(2)} of full speed, as fast as it is made` : "buffering");
  } else {
    parts.push(`${(state.num_frames / state.fps).toFixed(1)} s at ${state.fps} frames/s`);
    parts.push(state.status === "stopped" ? "stopped" : "complete");
    if (state.is_example) parts.unshift("an example");
  }
  find(".told").textContent = parts.join(" · ");
}

// Charts

function draw(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
  if (text !== undefined) node.textContent = text;
  return node;
}

// Axes of a chart of all planned chunks, and functions from chunk and value to coordinates.
function begin(svg, top, highest, label) {
  const width = svg.clientWidth || 300, height = svg.clientHeight || 110, left = 30, bottom = height - 16;
  const step = (width - left - 8) / Math.max(state.planned, 1);
  const x = (chunk) => left + step * (chunk + 0.5), y = (value) => bottom - (bottom - top) * (value / (highest || 1));
  svg.place = x;
  svg.chunkAt = (place) => Math.floor((place - left) / step);
  svg.replaceChildren(
    draw("line", { class: "axis", x1: left, x2: width - 8, y1: bottom, y2: bottom }),
    draw("text", { x: left - 4, y: top + 8, "text-anchor": "end" }, label),
    draw("text", { x: left - 4, y: bottom, "text-anchor": "end" }, "0"),
    draw("text", { x: x(0), y: height - 3, "text-anchor": "middle" }, "0"),
    draw("text", { x: x(state.planned - 1), y: height - 3, "text-anchor": "middle" }, state.planned - 1),
    ...(state.prompts ?? []).slice(1).map(([at]) =>
      draw("line", { class: "change-line", x1: x(at - 0.5), x2: x(at - 0.5), y1: top, y2: bottom })),
    draw("line", { class: "now", x1: x(0), x2: x(0), y1: top, y2: bottom }),
  );
  return { x, y, step, bottom };
}

function path(values, { x, y }) { // with gaps for unknown values
  let line = "";
  values.forEach((value, chunk) => {
    if (value !== null) line += `${line && values[chunk - 1] !== null ? "L" : "M"}${x(chunk).toFixed(1)} ${y(value).toFixed(1)}`;
  });
  return line;
}

function drawCharts() {
  if (!state.sides) return;
  const measures = ["severity", "threshold", "regenerated_severity"];
  const all = state.sides.flatMap((side) => side.chunks.flatMap((chunk) => measures.map((name) => chunk[name] ?? 0)));
  const highest = Math.max(...all, 0.001) * 1.08;
  state.sides.forEach(({ name, chunks }) => {
    const svg = find(`svg.severity[data-side=${name}]`), scale = begin(svg, 4, highest, highest.toPrecision(2));
    const dot = (value, chunk, kind, r) => draw("circle", { class: kind, cx: scale.x(chunk), cy: scale.y(value), r });
    svg.append(draw("path", { class: "threshold-line", d: path(chunks.map((chunk) => chunk.threshold), scale) }));
    svg.append(draw("path", { class: "severity-line", d: path(chunks.map((chunk) => chunk.severity), scale) }));
    chunks.forEach((chunk, index) => {
      if (chunk.event === "quarantined") {
        const place = scale.x(index);
        svg.append(draw("line", { class: "quarantined-line", x1: place, x2: place, y1: 4, y2: scale.bottom }));
      }
      if (chunk.severity !== null) {
        const trimmed = chunk.event === "trimmed";
        svg.append(dot(chunk.severity, index, trimmed ? "trimmed-dot" : "dot", trimmed ? 4 : 1.6));
      }
      if (chunk.regenerated_severity !== null) svg.append(dot(chunk.regenerated_severity, index, "again-dot", 4));
    });
  });

  find(".part").textContent = state.top < 1 ? ` of the top ${Math.round(100 * state.top)}%` : "";
  const svg = find("svg.drift"), drifts = state.sides.map(({ chunks }) => chunks.map(({ drift }) => drift));
  const most = Math.max(...drifts.flat(), 5) * 1.08, scale = begin(svg, 4, most, most.toPrecision(2));
  state.sides.forEach(({ name }, side) => svg.append(draw("path", { class: `${name}-line`, d: path(drifts[side], scale) })));
}

// State from the server

function update() {
  const value = props.value ?? {}, notice = find(".notice");
  notice.hidden = !value.message;
  notice.textContent = value.message ?? "";
  notice.classList.toggle("error", value.status === "error");
  if (value.message && window.innerWidth < 768) element.scrollIntoView({ behavior: "smooth", block: "start" });
  if (!value.run) return; // what was shown stays
  state = value;
  const begins = state.run !== run;
  if (begins) {
    run = state.run;
    isPaused = false;
    find(".play").textContent = "pause";
    players.forEach((player, number) => player.begin(new URL(state.sides[number].url, document.baseURI)));
  }
  find(".hint").hidden = true;
  find(".made").hidden = false;
  const [height, width] = state.size ?? [1, 1];
  state.sides.forEach((side, number) => {
    players[number].grow(side.bytes, !isRunning());
    const held = side.chunks.filter(({ events }) => events.includes("held")).length;
    const told = held ? `${side.method}, held ${held} of ${side.chunks.length} chunks` : side.method;
    find(`[data-side=${side.name}] .method`).textContent = told;
    find(`[data-side=${side.name}] .frame`).style.aspectRatio = `${width} / ${height}`;
  });
  find(".files").replaceChildren(...(state.files ?? []).map((file) => {
    const link = document.createElement("a");
    [link.href, link.download, link.textContent] = [new URL(file.url, document.baseURI), file.name, `↓ ${file.name}`];
    return link;
  }));
  drawCharts();
  pace();
  mark();
  if (begins && isRunning() && window.innerWidth < 768) element.scrollIntoView({ behavior: "smooth", block: "start" });
}

// The wipe: one picture over the other, cut at a line

const pictures = find(".pictures");

function wipe(percent) {
  pictures.style.setProperty("--wipe", `${percent}%`);
  find(".wiper").value = percent;
}

find(".view").addEventListener("click", () => {
  const isWipe = pictures.classList.toggle("wipe");
  find(".view").textContent = isWipe ? "side by side" : "wipe";
  find(".view").setAttribute("aria-pressed", isWipe);
});
find(".wiper").addEventListener("input", (event) => wipe(event.target.value));
find("[data-side=left] .frame").addEventListener("pointermove", (event) => {
  if (!pictures.classList.contains("wipe")) return;
  const { left, width } = event.currentTarget.getBoundingClientRect();
  wipe(Math.max(0, Math.min(100, (100 * (event.clientX - left)) / width)));
});

find(".play").addEventListener("click", () => {
  isPaused = !isPaused;
  find(".play").textContent = isPaused ? "play" : "pause";
  players.forEach(({ video }) => (isPaused ? video.pause() : video.play().catch(() => {})));
});
find(".time").addEventListener("input", (event) => seek(Number(event.target.value)));
find(".outline").addEventListener("change", mark);
element.querySelectorAll(".chart svg").forEach((svg) => svg.addEventListener("click", (event) => {
  const chunks = state.sides?.[0].chunks ?? [];
  const chunk = Math.max(0, Math.min(svg.chunkAt?.(event.offsetX) ?? 0, chunks.length - 1));
  seek(chunks.slice(0, chunk).reduce((sum, { frames }) => sum + frames, 0) / state.fps + 0.001);
}));
new ResizeObserver(drawCharts).observe(find(".made"));
find(".more").addEventListener("toggle", drawCharts);
element.players = players; // for tests
setInterval(() => { pace(); mark(); }, 100);
watch("value", update);
update();
