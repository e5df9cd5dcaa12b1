// The report of `tokentrim compare`: a table that sorts, and videos that play together. All numbers are in the page.

const data = JSON.parse(document.getElementById("data").textContent);
const { about, methods, reference } = data;
const find = (selector, inside = document) => inside.querySelector(selector);
const color = (name) => `var(--c${Object.keys(about.methods).indexOf(name) % 8})`;
const isNumber = (value) => typeof value === "number";
const fixed = (digits, sign = false) => (value) =>
  isNumber(value) ? (sign && value >= 0 ? "+" : "") + value.toFixed(digits) : "-";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => (name in node ? (node[name] = value) : node.setAttribute(name, value)));
  node.append(...children);
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  if (text !== undefined) node.textContent = text;
  return node;
}

function key(name) {
  const mark = make("span", { className: "key" });
  mark.style.setProperty("--color", color(name));
  return mark;
}

// First screen

find(".of").textContent = `${about.checkpoint}, ${about.chunks} chunks, ${about.prompts.length} prompts x ${about.seeds} seeds`;
find(".verdict").textContent = data.verdict;
document.title = `tokentrim compare: ${about.checkpoint}`;
if (data.videos.length < data.planned) {
  find(".growing").hidden = false;
  find(".growing").textContent = `${data.videos.length} of ${data.planned} videos are finished: reload to see more.`;
}

// Table

const difference = (line) => {
  if (line.method === reference) return "reference";
  return isNumber(line.difference) ? `${fixed(1, true)(line.difference)} [${fixed(1, true)(line.low)}, ${fixed(1, true)(line.high)}]` : "";
};
const COLUMNS = [
  ["method", (line) => line.method],
  ["drift", (line) => line.drift, fixed(1)],
  [`against ${reference} [95%]`, (line) => line.difference ?? 0, null, difference],
  ["lower in", (line) => line.lower_in, (value) => (isNumber(value) ? `${Math.round(100 * value)}%` : "")],
  ["motion, end / start", (line) => line.means.motion_late_to_early, fixed(2)],
  ["cuts", (line) => line.means.cuts, fixed(1)],
  ["contrast", (line) => line.means.contrast_slope, fixed(3, true)],
  ["calls", (line) => line.calls, (value) => (isNumber(value) ? `${value.toFixed(2)}x` : "")],
  ["frames/s", (line) => line.speed, fixed(2)],
  ["memory", (line) => line.memory, (value) => `${(value / 2 ** 30).toFixed(1)} GiB`],
  ["videos", (line) => line.videos, fixed(0)],
];
let sorted = { column: 1, sign: 1 };

function compare(first, second) {
  const [one, two] = [first, second].map(COLUMNS[sorted.column][1]);
  if (one === two) return 0;
  if (one === null || one === undefined) return 1;
  if (two === null || two === undefined) return -1;
  return sorted.sign * (one < two ? -1 : 1);
}

function fillTable() {
  find(".methods thead").replaceChildren(make("tr", {}, ...COLUMNS.map(([title], column) => {
    const button = make("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      sorted = { column, sign: sorted.column === column ? -sorted.sign : 1 };
      fillTable();
      find(`.methods thead th:nth-child(${column + 1}) button`).focus();
    });
    const head = make("th", { scope: "col" }, button);
    if (sorted.column === column) head.setAttribute("aria-sort", sorted.sign > 0 ? "ascending" : "descending");
    return head;
  })));
  find(".methods tbody").replaceChildren(...[...methods].sort(compare).map((line) => make("tr", {}, ...COLUMNS.map(([, value, show, told], column) => {
    if (!column) return make("th", { scope: "row", title: JSON.stringify(line.arguments) }, key(line.method), line.method);
    return make("td", { textContent: told ? told(line) : show(value(line)) });
  }))));
}

fillTable();
const part = about.top < 1 ? ` Only the top ${Math.round(100 * about.top)}% of the picture is measured, which is meant to stay.` : "";
find(".note").textContent =
  "Drift is the distance of the colors at the end from those at the start: 0 is the same, 100 is black to white. Differences are " +
  `means over pairs of one prompt and noise; from ${data.fewest} pairs on they are judged. A frozen video does not drift, and one ` +
  `that leaps back does not either: look at motion, cuts and the videos.${part}`;

// Prompts

const clock = (seconds) => `${seconds.toFixed(1)} s`;

function worst({ distances }) {
  return distances.reduce((best, value, number) => (value > distances[best] ? number : best), 0);
}

function drawCurves(svg, videos, now) {
  const width = svg.clientWidth || 600, height = svg.clientHeight || 170, left = 34, bottom = height - 20, right = width - 10;
  const frames = Math.max(...videos.map((video) => video.num_frames)), fps = videos[0].fps;
  const most = Math.max(2, ...videos.flatMap((video) => video.distances)) * 1.1;
  const x = (frame) => left + ((right - left) * frame) / frames, y = (value) => bottom - ((bottom - 10) * value) / most;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.place = (seconds) => x(seconds * fps);
  svg.secondsAt = (place) => Math.max(0, Math.min(1, (place - left) / (right - left))) * (frames / fps);
  svg.replaceChildren(
    draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    draw("line", { class: "axis", x1: left, x2: right, y1: y(most / 1.1), y2: y(most / 1.1) }),
    draw("text", { x: left - 5, y: bottom, "text-anchor": "end" }, "0"),
    draw("text", { x: left - 5, y: y(most / 1.1) + 4, "text-anchor": "end" }, (most / 1.1).toPrecision(2)),
    draw("text", { x: left, y: height - 4 }, "0 s"),
    draw("text", { x: right, y: height - 4, "text-anchor": "end" }, clock(frames / fps)),
    ...videos.map((video) => {
      const middles = video.ends.map((end, number) => (end + (number ? video.ends[number - 1] : 0)) / 2);
      const points = video.distances.map((value, number) => `${x(middles[number]).toFixed(1)},${y(value).toFixed(1)}`);
      return draw("polyline", { class: "curve", points: points.join(" "), style: `stroke: ${color(video.method)}` });
    }),
    ...videos.map((video) => {
      const number = worst(video), start = number ? video.ends[number - 1] : 0;
      const dot = draw("circle", { cx: x((video.ends[number] + start) / 2), cy: y(video.distances[number]), r: 4, style: `fill: ${color(video.method)}` });
      dot.append(draw("title", {}, `${video.method}: worst at ${clock(start / video.fps)}`));
      return dot;
    }),
    draw("line", { class: "now", x1: x(now * fps), x2: x(now * fps), y1: 6, y2: bottom }),
  );
}

function showVideos(box, videos) {
  const { fps } = videos[0], length = Math.max(...videos.map((video) => video.num_frames)) / fps;
  const players = videos.map((video) => {
    const player = make("video", { muted: true, playsInline: true, preload: "auto", src: video.file });
    player.style.aspectRatio = `${video.size[1]} / ${video.size[0]}`;
    return player;
  });
  const figures = videos.map((video, number) => {
    const drift = video.measures.color_distance, done = Object.entries(video.events).map(([event, count]) => `${event} ${count}`);
    const told = make("span", { className: "small", textContent: ` drift ${drift.toFixed(1)}${done.length ? `; ${done.join(", ")}` : ""}` });
    return make("figure", {}, make("figcaption", {}, key(video.method), video.method, told), players[number]);
  });
  const button = make("button", { type: "button", textContent: "play" });
  const slider = make("input", { type: "range", min: 0, max: length, step: "any", value: 0 });
  slider.setAttribute("aria-label", "time of all videos");
  const output = make("output", { textContent: `0.0 / ${clock(length)}` });
  const svg = draw("svg", { class: "curves", role: "img", "aria-label": "drift over time" });
  const strips = make("details", {}, make("summary", { textContent: "film strips" }));
  strips.addEventListener("toggle", () => { // pictures are read when they are asked for
    if (strips.open && strips.children.length === 1) strips.append(...videos.map((video) => make("div", { className: "strip" }, key(video.method), video.method,
      make("img", { src: video.file.replace(/mp4$/, "jpg"), alt: `film strip of ${video.method}` }))));
  });
  let isPlaying = false, began = 0, from = 0;

  // The clock is the page's, not a video's: all follow it, however fast each one decodes.
  const now = () => (isPlaying ? (from + (performance.now() - began) / 1000) % length : from);
  const seek = (seconds) => {
    from = Math.max(0, Math.min(seconds, length));
    began = performance.now();
    players.forEach((player) => { player.currentTime = Math.min(from, length - 0.5 / fps); });
    show();
  };
  const show = () => {
    const seconds = now(), line = find(".now", svg);
    if (!slider.matches(":active")) slider.value = seconds;
    output.textContent = `${seconds.toFixed(1)} / ${clock(length)}`;
    if (line) ["x1", "x2"].forEach((end) => line.setAttribute(end, svg.place(seconds)));
  };
  const tick = () => {
    if (!isPlaying || !box.isConnected) return;
    const seconds = now();
    players.forEach((player) => {
      if (Math.abs(player.currentTime - seconds) > 0.25 && !player.seeking) player.currentTime = seconds;
      if (player.paused) player.play().catch(() => {});
    });
    show();
    requestAnimationFrame(tick);
  };
  button.addEventListener("click", () => {
    from = now();
    isPlaying = !isPlaying;
    began = performance.now();
    button.textContent = isPlaying ? "pause" : "play";
    players.forEach((player) => (isPlaying ? player.play().catch(() => {}) : player.pause()));
    if (isPlaying) requestAnimationFrame(tick);
    else seek(from);
  });
  slider.addEventListener("input", () => seek(Number(slider.value)));
  svg.addEventListener("click", (event) => seek(svg.secondsAt(event.offsetX)));
  box.replaceChildren(make("div", { className: "videos" }, ...figures), make("div", { className: "bar" }, button, slider, output), svg, strips);
  new ResizeObserver(() => drawCurves(svg, videos, now())).observe(svg);
}

function showPrompt(number) {
  const videos = data.videos.filter((video) => video.prompt_number === number);
  if (!videos.length) return;
  const seeds = [...new Set(videos.map((video) => video.seed))].sort((a, b) => a - b);
  const pick = make("select", {}, ...seeds.map((seed) => make("option", { value: seed, textContent: seed })));
  const box = make("div");
  const show = () => showVideos(box, videos.filter((video) => video.seed === Number(pick.value)));
  pick.addEventListener("change", show);
  const article = make("article", { className: "prompt" },
    make("header", {}, make("h3", { textContent: about.prompts[number] }), make("label", {}, "seed ", pick)), box);
  find(".prompts").append(article);
  const seen = new IntersectionObserver(([entry]) => { // videos are read when they come near
    if (!entry.isIntersecting) return;
    seen.disconnect();
    show();
  }, { rootMargin: "600px" });
  seen.observe(article);
}

about.prompts.forEach((_, number) => showPrompt(number));

// Settings and downloads

const first = methods[0] ?? {};
const SETTINGS = {
  checkpoint: about.checkpoint,
  "fingerprint of the weights": about.weights,
  "weights in": about.dtype,
  videos: first.size && `${first.num_frames} frames of ${first.size[1]} x ${first.size[0]}, ${first.fps} frames/s`,
  "shared arguments": JSON.stringify(about.settings),
  methods: Object.entries(about.methods).map(([name, settings]) => `${name}: ${JSON.stringify(settings)}`).join("; "),
  seeds: `from ${about.first_seed}; the first of each prompt is 1000 more than that of the one before`,
  batch: `${about.batch} videos`,
  machine: [...new Set(methods.map((line) => line.machine))].join("; "),
  versions: first.versions && Object.entries(first.versions).map((pair) => pair.join(" ")).join(", "),
};
find(".settings").append(...Object.entries(SETTINGS).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value ?? "" })]));

const FILES = { ...data.tables, "comparison.json": JSON.stringify({ about, verdict: data.verdict, methods, videos: data.videos }, null, 1) };
find(".downloads").append(...Object.entries(FILES).map(([name, text]) => {
  const button = make("button", { type: "button", textContent: `↓ ${name}` });
  button.addEventListener("click", () => {
    const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text])) });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  return button;
}));
