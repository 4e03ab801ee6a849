// The page: what the reader chooses, and what is shown.

import {colourTable, download, draw, npy, scale, scaled} from './drawing.mjs';
import {decode, prepare} from './pixels.mjs';

const LARGEST = 100e6; // pixels of a picture
const SHOWN = 1200; // pixels that the longer side has at most on the screen
const ENLARGED = 640; // smaller pictures are enlarged, by a whole number, up to this
const CHECK_LIMIT = 0.02; // largest difference from Python's map after min-max; one rectifier that flips gives 1e-3
const $ = (id) => document.getElementById(id);
const site = await (await fetch('site.json')).json();
const [channels, ...size] = site.input_shape;

// ---- the worker

let worker;
let waiting = new Map();
let calls = 0;

function start() {
  worker?.terminate();
  waiting = new Map();
  worker = new Worker('engine.mjs', {type: 'module'});
  worker.onmessage = ({data}) => {
    if (data.progress !== undefined) {
      say(`Loading the network: ${Math.round(100 * data.progress)} %`);
      return;
    }
    const {resolve, reject} = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error === undefined) resolve(data.result);
    else reject(new Error(data.error));
  };
  worker.onerror = (event) => {
    for (const {reject} of waiting.values()) reject(new Error(event.message || 'the engine cannot start'));
    waiting.clear();
  };
}

function ask(call, ...args) {
  return new Promise((resolve, reject) => {
    const id = calls++;
    waiting.set(id, {resolve, reject});
    worker.postMessage({id, call, args});
  });
}

// ---- what is known

const state = {
  photo: null, // {name, picture: canvas, input, placed}
  result: null, // {map, layerWeights, logits, target}
  method: site.methods[0].id,
  target: -1,
  engine: null,
  networkRuns: 0,
  retunes: 0,
  timing: {},
  checks: {},
};

const method = () => site.methods.find((m) => m.id === state.method);
const names = site.classes ?? [];
const className = (index) => {
  const name = names[index];
  if (name === undefined) return `class ${index}`;
  return names.indexOf(name) === names.lastIndexOf(name) ? name : `${name} (${index})`;
};

function say(text) {
  $('status').textContent = text;
}

function complain(text) {
  $('problem').textContent = text;
  $('problem').hidden = !text;
}

function probabilities(logits) {
  if (site.probability === 'sigmoid') return Array.from(logits, (z) => 1 / (1 + Math.exp(-z)));
  const top = Math.max(...logits);
  const powers = Array.from(logits, (z) => Math.exp(z - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((p) => p / sum);
}

function topOf(logits) {
  let top = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[top]) top = i;
  return top;
}

// ---- the network

let turn = 0; // of the latest picture, class or method: results of earlier ones are not shown
let last = Promise.resolve();

// Work that talks to the worker more than once runs alone: another method must not be opened in between.
function alone(work) {
  const result = last.then(work, work);
  last = result.catch(() => {});
  return result;
}

// Runs a method once on a picture with a known map: an engine that gives another one is not used.
async function check(chosen) {
  const {file, target} = chosen.check;
  const expected = scaled(new Float32Array(await (await fetch(file)).arrayBuffer()));
  const {input} = prepare(await decode(await (await fetch('check.png')).blob()), site.preprocess, channels, site.turns);
  let result = await ask('run', input, target);
  if (chosen.finish) result = {...result, ...(await ask('retune', site.percentile))};
  const got = scaled(result.map);
  let difference = 0;
  for (let i = 0; i < got.length; i++) difference = Math.max(difference, Math.abs(got[i] - expected[i]));
  if (!(difference <= CHECK_LIMIT)) throw new Error(`its map differs from the reference by ${difference.toFixed(3)}`);
  state.checks[chosen.id] = {difference, constant: expected.every((value) => value === 0)};
}

async function open() {
  const asked = new URLSearchParams(location.search).get('engine');
  const adapter = asked === 'wasm' ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  for (const wanted of adapter ? ['webgpu', 'wasm'] : ['wasm']) {
    try {
      start();
      state.engine = await ask('open', wanted);
      await choose(method());
      return;
    } catch (error) {
      if (wanted === 'wasm') throw error;
      complain(`WebGPU is not used (${error.message}): the processor computes instead.`);
    }
  }
}

// Opens a method, and checks it the first time.
async function choose(chosen) {
  say(`Opening ${chosen.label}…`);
  await ask('choose', chosen.id);
  if (!(chosen.id in state.checks)) await check(chosen);
  const {provider, threads} = state.engine;
  const where = provider === 'webgpu' ? 'WebGPU' : `WebAssembly, ${threads} thread${threads > 1 ? 's' : ''}`;
  const {difference, constant} = state.checks[chosen.id];
  const checked = constant
    ? `${chosen.label} could not be checked here: its reference map is constant`
    : `${chosen.label} gives the reference map here within ${difference.toExponential(0)}`;
  $('engine').textContent = `${where}; ${checked}`;
}

function explain() {
  const mine = ++turn;
  const chosen = method();
  $('tuning').hidden = !chosen.finish;
  if (!state.photo) {
    return alone(async () => {
      if (mine !== turn) return;
      await choose(chosen).then(() => say('Choose a picture.'), (error) => complain(error.message));
    });
  }
  $('view').setAttribute('aria-busy', 'true');
  return alone(async () => {
    if (mine !== turn) return;
    complain('');
    try {
      await choose(chosen);
      say('Running the network…');
      const began = performance.now();
      const run = await ask('run', state.photo.input, state.target);
      state.timing.network = performance.now() - began;
      state.networkRuns++;
      const tuned = chosen.finish ? await retuned() : {};
      if (mine !== turn) return;
      const target = state.target < 0 ? topOf(run.logits) : state.target;
      state.result = {...run, ...tuned, target};
      showClasses();
      show();
    } catch (error) {
      if (mine !== turn) return;
      say('');
      complain(`${chosen.label} cannot run in this browser: ${error.message}`);
    } finally {
      if (mine === turn) $('view').setAttribute('aria-busy', 'false');
    }
  });
}

async function retuned() {
  const began = performance.now();
  const tuned = await ask('retune', Number($('percentile').value));
  state.timing.retune = performance.now() - began;
  state.retunes++;
  return tuned;
}

let moved = false;

// Retunes as fast as the slider moves: while one map is made, only the slider's last position waits.
function tune() {
  if (moved) return;
  moved = true;
  const mine = turn;
  alone(async () => {
    moved = false;
    if (mine !== turn || !state.result || !method().finish) return;
    const tuned = await retuned();
    if (mine !== turn) return;
    Object.assign(state.result, tuned);
    show();
  });
}

// ---- what is shown

function currentMap() {
  return state.result?.map ? {values: scaled(state.result.map), size} : null;
}

function paint() {
  if (!state.photo) return;
  const {picture, placed} = state.photo;
  const canvas = $('canvas');
  const shrink = Math.min(1, SHOWN / Math.max(picture.width, picture.height));
  const grow = Math.max(1, Math.floor(ENLARGED / Math.max(picture.width, picture.height))); // small pictures are enlarged
  canvas.width = Math.max(1, Math.round(picture.width * shrink * grow));
  canvas.height = Math.max(1, Math.round(picture.height * shrink * grow));
  const table = colourTable(site.colormaps[$('colormap').value]);
  draw(canvas, picture, currentMap(), placed, table, Number($('opacity').value) / 100);
  scale($('scale'), table);
}

function show() {
  paint();
  const {target, logits, map} = state.result;
  const probability = probabilities(logits)[target];
  const at = method().finish ? `, percentile ${$('percentile').value}` : '';
  const title = `${method().label} for ${className(target)}${at}`;
  $('title').textContent = title;
  $('canvas').setAttribute('aria-label', `${title}, drawn over ${state.photo.name}`);
  say(`${className(target)}: ${(100 * probability).toFixed(1)} %`);
  const flat = map.every((value) => value === map[0]);
  complain(flat ? 'This map is constant: by this method, no place raised the score of this class. Try another.' : '');
  showWeights();
  $('results').hidden = false;
}

function row(name, value, share) {
  const line = document.createElement('div');
  const label = document.createElement('span');
  const bar = document.createElement('span');
  const number = document.createElement('span');
  line.className = 'row';
  label.className = 'name';
  label.textContent = name;
  label.title = name;
  bar.className = 'bar';
  bar.setAttribute('aria-hidden', 'true');
  bar.style.setProperty('--share', `${100 * Math.max(0, share)}%`);
  number.className = 'number';
  number.textContent = value;
  line.append(label, bar, number);
  return line;
}

function showClasses() {
  const {logits, target} = state.result;
  const shares = probabilities(logits);
  const focused = $('classes').contains(document.activeElement);
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b).slice(0, 5);
  if (!order.includes(target)) order.push(target);
  $('classes').replaceChildren(...order.map((index) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'choice';
    button.setAttribute('aria-pressed', String(index === target));
    button.dataset.index = index;
    button.append(...row(className(index), `${(100 * shares[index]).toFixed(1)} %`, shares[index]).children);
    button.onclick = () => {
      state.target = index;
      explain();
    };
    return button;
  }));
  if (focused) $('classes').querySelector('[aria-pressed=true]').focus();
}

function showWeights() {
  const {layers} = method();
  const weights = state.result.layerWeights;
  const several = weights && layers.length > 1;
  $('weights').hidden = !several;
  if (!several) return;
  const most = Math.max(...weights, 1e-12);
  $('bars').replaceChildren(...layers.map((name, i) => {
    const item = document.createElement('li');
    item.append(row(name, weights[i].toFixed(3), weights[i] / most));
    return item;
  }));
}

// ---- pictures

async function take(blob, name) {
  const mine = ++turn; // a picture that is read slowly must not replace a later one
  complain('');
  let image;
  try {
    image = await decode(blob);
  } catch {
    if (mine !== turn) return;
    complain(`${name || 'This'} is not a picture that this browser can read: use PNG, JPEG, WebP or another common format.`);
    return;
  }
  if (mine !== turn) return;
  if (image.width * image.height > LARGEST) {
    complain(`${name}: ${Math.round((image.width * image.height) / 1e6)} million pixels are too many: use at most 100.`);
    return;
  }
  const picture = new OffscreenCanvas(image.width, image.height);
  picture.getContext('2d').putImageData(image, 0, 0);
  let prepared;
  try {
    prepared = prepare(image, site.preprocess, channels, site.turns);
  } catch {
    complain(`${name}: too narrow for the network: crop it first.`);
    return;
  }
  state.photo = {name: name || 'picture', picture, ...prepared};
  state.result = null;
  state.target = -1;
  $('results').hidden = true;
  $('empty').hidden = true;
  $('view').hidden = false;
  $('title').textContent = '';
  $('photo').textContent = state.photo.name;
  paint();
  await explain();
}

function taken(files, otherwise) {
  const file = Array.from(files ?? []).find((f) => f.type.startsWith('image/')) ?? files?.[0];
  if (file) take(file, file.name);
  else if (otherwise) complain(otherwise);
}

const drop = $('drop');
$('file').onchange = (event) => {
  taken(event.target.files);
  event.target.value = ''; // the same file can be chosen again
};
window.addEventListener('dragover', (event) => {
  event.preventDefault();
  drop.classList.add('over');
});
window.addEventListener('dragleave', (event) => {
  if (!event.relatedTarget) drop.classList.remove('over');
});
window.addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  taken(event.dataTransfer.files, 'What was dropped is no file: save the picture first.');
});
window.addEventListener('paste', (event) => {
  if (event.target.matches?.('input[type=text], input[list]')) return;
  taken(event.clipboardData.files, 'The clipboard holds no picture.');
});

// ---- the camera

const camera = $('camera');
const video = $('video');

function stopCamera() {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}

$('open-camera').hidden = !navigator.mediaDevices?.getUserMedia;
$('open-camera').onclick = async () => {
  complain('');
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}, audio: false});
  } catch (error) {
    complain(`The camera cannot be used: ${error.name === 'NotAllowedError' ? 'it was not allowed' : error.message}.`);
    return;
  }
  camera.showModal();
  await video.play();
};
camera.addEventListener('close', stopCamera);
$('close-camera').onclick = () => camera.close();
$('shoot').onclick = async () => {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext('2d').drawImage(video, 0, 0);
  camera.close();
  await take(await canvas.convertToBlob(), 'camera');
};

// ---- controls

$('heading').textContent = site.name;
document.title = `${site.name}: what the network looks at`;
for (const {id, label} of site.methods) $('method').add(new Option(label, id));
for (const name of Object.keys(site.colormaps)) $('colormap').add(new Option(name, name));
$('colormap').value = 'turbo';
$('percentile').value = site.percentile;
$('percentile-value').textContent = site.percentile;
$('opacity-value').textContent = `${$('opacity').value} %`;
$('method').onchange = (event) => {
  state.method = event.target.value;
  explain();
};
$('percentile').oninput = (event) => {
  $('percentile-value').textContent = event.target.value;
  if (state.result) tune();
};
$('opacity').oninput = (event) => {
  $('opacity-value').textContent = `${event.target.value} %`;
  paint();
};
$('colormap').onchange = paint;

const known = Array.from({length: site.num_classes}, (_, i) => className(i));
$('known').append(...known.map((name) => new Option(name)));
$('any').onchange = (event) => {
  const text = event.target.value.trim();
  if (!text) return;
  let index = known.indexOf(text);
  if (index < 0) index = known.findIndex((name) => name.toLowerCase() === text.toLowerCase());
  if (index < 0 && /^\d+$/.test(text) && Number(text) < known.length) index = Number(text);
  if (index < 0) {
    complain(`There is no class “${text}”: choose one from the list.`);
    return;
  }
  event.target.value = '';
  state.target = index;
  explain();
};

function fileName(ending) {
  const stem = state.photo.name.replace(/\.[^.]*$/, '');
  const named = [stem, state.method.replaceAll(/[^\w.-]+/g, '-'), className(state.result.target)];
  return `${named.join('-').replaceAll(/[^\p{L}\p{N}._-]+/gu, '-')}.${ending}`;
}

$('save-png').onclick = async () => {
  const {picture, placed} = state.photo;
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const table = colourTable(site.colormaps[$('colormap').value]);
  draw(canvas, picture, currentMap(), placed, table, Number($('opacity').value) / 100);
  download(await canvas.convertToBlob(), fileName('png'));
};
$('save-npy').onclick = () => download(npy(state.result.map, size), fileName('npy'));

for (const {file, label} of site.examples) {
  const button = document.createElement('button');
  const image = document.createElement('img');
  button.type = 'button';
  image.src = file;
  image.alt = `example: ${label}`;
  button.append(image);
  button.onclick = async () => take(await (await fetch(file)).blob(), label);
  $('examples').append(button);
}
$('examples').hidden = site.examples.length === 0;

window.camrt = {state, ask, decode, prepare, site}; // for tests and the curious
$('tuning').hidden = !method().finish;
try {
  await alone(open);
  say(state.photo ? '' : 'Ready. Choose a picture.');
  document.body.dataset.ready = 'yes';
} catch (error) {
  say('');
  complain(`The network cannot run in this browser: ${error.message}`);
  document.body.dataset.ready = 'no';
}
