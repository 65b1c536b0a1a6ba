// The page: what is typed and pressed goes to the server, frames and their status come back.

import { Player } from "./player.js";

const el = (id) => document.getElementById(id);
const config = await (await fetch("config")).json();
const ACK_MS = 100; // between two messages that say what has been shown
const SMALL = 128; // pixels a side up to which enlarged pixels stay squares

let socket = null, connecting = false;
let state = "idle"; // idle, starting, waiting, running, ended, stopped, failed
let video = 0; // number of the one that is shown, as the server counts them on this connection
let asking = false; // for another one
let token = null, made = 0, acked = 0, ackedAt = 0, clicked = 0;
let prompts = []; // [{frame, prompt}]: from which frame on each one holds

const player = new Player(el("canvas"), config.fps, config.ahead, (index, now) => {
  if (player.shown === 1) {
    el("first").textContent = seconds((performance.now() - clicked) / 1000);
    el("hint").textContent = "";
  }
  while (prompts.length && prompts[0].frame <= index) caption(prompts.shift().prompt);
  el("frames").textContent = String(player.shown);
  acknowledge(now);
});

function seconds(value) { return value < 0.995 ? `${Math.max(1, Math.round(value * 1000))} ms` : `${value.toFixed(1)} s`; }

function fps(value) { return `${value.toFixed(value < 9.95 ? 1 : 0)} fps`; }

function caption(text) {
  el("caption").textContent = `“${text}”`;
  el("canvas").setAttribute("aria-label", `The video as it is made: ${text}`);
}

function say(text) { if (el("status").textContent !== text) el("status").textContent = text; }

function complain(text) { el("error").textContent = text; }

function send(message) { if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); }

function acknowledge(now) {
  if (!asking && player.shown > acked && now - ackedAt >= ACK_MS) {
    acked = player.shown;
    ackedAt = now;
    send({ type: "shown", frames: acked });
  }
}

const busy = () => ["starting", "waiting", "running"].includes(state);

function enter(next) {
  state = next;
  el("screen").dataset.state = next;
  el("start").textContent = busy() ? "Restart" : "Start";
  el("start").classList.toggle("primary", !busy());
  el("change").classList.toggle("primary", busy());
  el("change").disabled = !busy();
  el("stop").disabled = !busy();
  el("live").hidden = next !== "running" || player.shown === 0;
}

// ------------------------------------------------------------------------------------------------------- the server

function connect() {
  return new Promise((resolve, reject) => {
    const url = new URL("stream", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const opened = new WebSocket(url);
    opened.binaryType = "arraybuffer";
    opened.onopen = () => { socket = opened; resolve(); };
    opened.onmessage = ({ data }) => {
      if (socket !== opened) return; // of a connection that is not ours any more
      typeof data === "string" ? hear(JSON.parse(data)) : player.add(data);
    };
    opened.onclose = (event) => {
      if (socket === opened) lost(event);
      reject(new Error("the server does not answer: is it running?"));
    };
  });
}

function lost(event) {
  socket = null;
  asking = false;
  player.stop();
  const why = event.reason || { 1012: "the server has ended", 1009: "the message was too long" }[event.code];
  complain(`Disconnected: ${why || "the connection broke"}. Start connects again.`);
  say("Not connected.");
  el("hint").textContent = player.shown ? "" : "Type a prompt and press Start";
  enter("idle");
}

function hear(message) {
  if (message.type === "error") {
    asking = false;
    complain(message.message);
    if (!message.goes_on && busy()) { el("hint").textContent = ""; say("Not started."); enter("idle"); }
    return;
  }
  if (message.video > video) adopt(message.video);
  if (asking || message.video !== video) return;
  if (message.type === "prompt") {
    prompts.push({ frame: message.frame, prompt: message.prompt });
  } else {
    told(message);
  }
}

function told(status) {
  made = status.frames;
  token = status.token;
  el("download").disabled = !token;
  el("seed-note").textContent = `this video's seed is ${status.seed}`;
  if (status.fps) el("made-fps").textContent = fps(status.fps);
  if (status.first) el("first-note").textContent = `${seconds(status.first)} of it in the model`;
  if (status.state === "waiting") {
    el("hint").textContent = `In line: place ${status.place}`;
    say(`All places are taken. You are number ${status.place} in line.`);
  } else if (status.state === "running") {
    if (!player.shown) el("hint").textContent = "Making the first frames …";
    say("Streaming.");
  } else if (status.state === "failed") {
    complain(status.error);
    el("hint").textContent = "";
    say("The video could not go on.");
  } else {
    say(status.state === "ended" ? `Done: ${made} frames, ${status.error ? `as ${status.error}` : "the most that a video may have here"}.` : `Stopped after ${made} frames.`);
    if (!made) el("hint").textContent = "Type a prompt and press Start";
  }
  enter(status.state);
}

// -------------------------------------------------------------------------------------------------------- the visitor

async function start() {
  complain("");
  if (connecting) return; // a double click: what is typed by then is sent once
  clicked = performance.now();
  asking = true;
  say("Starting.");
  if (!busy()) enter("starting");
  try {
    if (!socket) {
      video = 0;
      connecting = true;
      await connect();
    }
    const seed = el("seed").value === "" ? {} : { seed: Number(el("seed").value) };
    send({ type: "start", prompt: el("prompt").value, ...seed });
  } catch (problem) {
    asking = false;
    complain(problem.message);
    say("Not connected.");
    enter("idle");
  } finally {
    connecting = false;
  }
}

// The server has begun another video: nothing of the one before is left.
function adopt(number) {
  asking = false;
  video = number;
  player.reset(video);
  prompts = [];
  token = null;
  made = acked = 0;
  for (const id of ["first", "made-fps", "shown-fps"]) el(id).textContent = "–";
  el("first-note").textContent = "from click to screen";
  el("frames").textContent = "0";
  el("caption").textContent = "";
  el("download").disabled = true;
  el("canvas").getContext("2d").clearRect(0, 0, el("canvas").width, el("canvas").height);
}

function change() {
  if (!el("form").reportValidity()) return;
  complain("");
  send({ type: "prompt", prompt: el("prompt").value });
  say("The new prompt holds from the next block that is begun.");
}

function stop() {
  send({ type: "stop" });
  player.stop();
}

async function download() {
  const button = el("download");
  button.disabled = true;
  button.textContent = "Preparing …";
  complain("");
  try {
    const answer = await fetch(`video/${encodeURIComponent(token)}`);
    if (!answer.ok) throw new Error(await answer.text());
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = "fewstep.mp4";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (problem) {
    complain(`Download: ${problem.message}`);
  }
  button.textContent = "Download MP4";
  button.disabled = !token;
}

function count() {
  const length = el("prompt").value.length;
  el("count").textContent = `${length} / ${config.prompt_chars}`;
}

el("form").addEventListener("submit", (event) => { event.preventDefault(); start(); });
el("change").addEventListener("click", change);
el("stop").addEventListener("click", stop);
el("download").addEventListener("click", download);
el("prompt").addEventListener("input", count);
el("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (busy()) change(); else el("form").requestSubmit();
});

// ----------------------------------------------------------------------------------------------------------- at first

el("canvas").width = config.width;
el("canvas").height = config.height;
el("canvas").classList.toggle("pixels", Math.max(config.width, config.height) <= SMALL);
el("facts").textContent = `${config.title} · ${config.width} × ${config.height} pixels · ${config.steps} steps`;
el("frames-note").textContent = `of ${config.max_frames} at most`;
el("shown-note").textContent = `on this page, ${config.fps} at most`;
el("prompt").maxLength = config.prompt_chars;
el("prompt").value = config.examples[0] || "";
for (const example of config.examples) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = example;
  button.addEventListener("click", () => { el("prompt").value = example; count(); el("prompt").focus(); });
  el("examples").append(button);
}
count();
setInterval(() => {
  acknowledge(performance.now());
  const rate = player.rate;
  if (rate && state === "running") el("shown-fps").textContent = fps(rate);
}, 500);
