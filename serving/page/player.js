// Shows frames at an even pace from a small buffer, slower while the buffer runs low.

export class Player {
  // onFrame(index): the frame has been drawn
  constructor(canvas, fps, ahead, onFrame) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.fps = fps;
    this.target = Math.max(1, Math.min(fps / 2, ahead / 2)); // frames in store at which the pace is full
    this.onFrame = onFrame;
    this.reset(0);
    const tick = (now) => { this.tick(now); requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
  }

  // Begins another video, by its number; frames of others are dropped from here on.
  reset(video) {
    this.stop();
    this.video = video;
    this.shown = 0;
  }

  // Draws nothing more, whatever is still on its way or being decoded, until `reset`.
  stop() {
    for (const frame of this.queue || []) frame.bitmap.close();
    this.video = null;
    this.generation = (this.generation || 0) + 1; // numbers of videos come again on another connection
    this.queue = [];
    this.decoding = Promise.resolve();
    this.pending = 0;
    this.due = 0;
    this.times = [];
  }

  // message: as `frame_message` in serving/protocol.py makes it.
  add(message) {
    const numbers = new DataView(message);
    const video = numbers.getUint32(0, true), index = numbers.getUint32(4, true);
    if (video !== this.video) return;
    const generation = this.generation;
    this.pending += 1;
    const bitmap = createImageBitmap(new Blob([new Uint8Array(message, 8)]));
    this.decoding = Promise.all([this.decoding, bitmap]).then(([, image]) => {
      if (generation !== this.generation) { image.close(); return; }
      this.pending -= 1;
      this.queue.push({ index, bitmap: image });
    });
  }

  get empty() { return this.queue.length === 0 && this.pending === 0; }

  // Frames a second over the last two seconds; nothing before there is one.
  get rate() {
    const times = this.times, span = times.length ? times[times.length - 1] - times[0] : 0;
    return span >= 1000 ? (times.length - 1) * 1000 / span : null;
  }

  tick(now) {
    if (this.queue.length === 0 || now < this.due) return;
    const { index, bitmap } = this.queue.shift();
    if (this.canvas.width !== bitmap.width || this.canvas.height !== bitmap.height) {
      this.canvas.width = bitmap.width;
      this.canvas.height = bitmap.height;
    }
    this.context.drawImage(bitmap, 0, 0);
    bitmap.close();
    const store = Math.max(0.3, Math.min(1, (this.queue.length + 1) / this.target));
    const step = 1000 / (this.fps * store);
    this.due = Math.max(this.due + step, now + step / 2);
    this.times.push(now);
    while (now - this.times[0] > 2000) this.times.shift();
    this.shown += 1;
    this.onFrame(index, now);
  }
}
