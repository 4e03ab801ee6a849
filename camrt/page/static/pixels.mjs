// From a picture's pixels to the network's input, with the same bits as Pillow's resize and camrt's recipe in Python.

const BITS = 22; // of the weights' fixed point
const ONE = 2 ** BITS;
const RADIUS = {bilinear: 1, bicubic: 2, lanczos: 3};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

const FILTERS = {
  bilinear: (x) => Math.max(1 - x, 0),
  bicubic: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0),
  lanczos: (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0),
};

// For each position from `start` on: [first source position, weights in fixed point].
function spans(size, target, filter, start, length) {
  const scale = size / target;
  const stretch = Math.max(scale, 1);
  const found = [];
  if (filter === 'nearest') {
    let at = scale * 0.5; // Pillow adds step to step, and rounds as that does
    for (let i = 0; i < start + length; i++) {
      if (i >= start) found.push([Math.min(Math.trunc(at), size - 1), [ONE]]);
      at += scale;
    }
    return found;
  }
  for (let i = start; i < start + length; i++) {
    const centre = (i + 0.5) * scale;
    const reach = RADIUS[filter] * stretch;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach + 0.5), size);
    const weights = [];
    let sum = 0;
    for (let j = first; j < last; j++) {
      const weight = FILTERS[filter](Math.abs((j - centre + 0.5) * (1 / stretch)));
      weights.push(weight);
      sum += weight;
    }
    found.push([first, weights.map((w) => {
      const fixed = w * (1 / sum) * ONE;
      return Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    })]);
  }
  return found;
}

// One axis of pixels {data, width, height, channels}: resized to `target`, of which `length` from `start` on are kept.
function resizeAxis(pixels, columns, target, filter, start, length) {
  const {data, width, height, channels} = pixels;
  const size = columns ? width : height;
  if (target === size && start === 0 && length === size) return pixels;
  const table = target === size
    ? Array.from({length}, (_, i) => [start + i, [ONE]])
    : spans(size, target, filter, start, length);
  const outWidth = columns ? length : width;
  const outHeight = columns ? height : length;
  const out = new Uint8ClampedArray(outWidth * outHeight * channels);
  const step = (columns ? 1 : width) * channels;
  for (let y = 0; y < outHeight; y++) {
    for (let x = 0; x < outWidth; x++) {
      const [first, weights] = table[columns ? x : y];
      const from = columns ? (y * width + first) * channels : (first * width + x) * channels;
      for (let c = 0; c < channels; c++) {
        let sum = ONE / 2;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * data[from + k * step + c];
        out[(y * outWidth + x) * channels + c] = Math.floor(sum / ONE);
      }
    }
  }
  return {data: out, width: outWidth, height: outHeight, channels};
}

// Python's round: to the nearest whole number, halves to the even one.
function round(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

// Where the network's input lies in a picture: {resized: [h, w], top, left, size: [h, w]}.
export function place(width, height, recipe) {
  if (recipe.fit === 'letterbox') {
    const [fullHeight, fullWidth] = recipe.resize;
    const scale = Math.min(fullHeight / height, fullWidth / width);
    const resized = [Math.max(1, round(height * scale)), Math.max(1, round(width * scale))];
    const top = -Math.floor((fullHeight - resized[0]) / 2);
    const left = -Math.floor((fullWidth - resized[1]) / 2);
    return {resized, top, left, size: [fullHeight, fullWidth]};
  }
  let resized = recipe.resize;
  if (!Array.isArray(resized)) {
    const other = Math.trunc((recipe.resize * Math.max(width, height)) / Math.min(width, height));
    resized = width <= height ? [other, recipe.resize] : [recipe.resize, other];
  }
  const size = recipe.crop ?? resized;
  return {resized, top: round((resized[0] - size[0]) / 2), left: round((resized[1] - size[1]) / 2), size};
}

// RGBA, as a canvas has it -> RGB or grey, as Pillow makes it: transparent pixels on white.
export function opaque(image, channels) {
  const {data: rgba, width, height} = image;
  const data = new Uint8ClampedArray(width * height * channels);
  const rgb = [0, 0, 0];
  for (let i = 0; i < width * height; i++) {
    const alpha = rgba[4 * i + 3];
    for (let c = 0; c < 3; c++) {
      let value = rgba[4 * i + c];
      if (alpha < 255) {
        const sum = value * alpha * 128 + 255 * (255 * 128 - alpha * 128) + 128 * 128;
        value = ((Math.floor(sum / 256) + sum) / 256) >> 7;
      }
      rgb[c] = value;
    }
    if (channels === 3) data.set(rgb, 3 * i);
    else data[i] = (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 32768) >>> 16;
  }
  return {data, width, height, channels};
}

// The network's input (1, C, h, w) of an ImageData, and where it lies in the picture. `turns`: whether this recipe's
// Pillow resizes the height first where it shrinks by more than twice what the width does.
export function prepare(image, recipe, channels, turns) {
  const placed = place(image.width, image.height, recipe);
  const [h, w] = placed.resized;
  const letterbox = recipe.fit === 'letterbox';
  const rows = letterbox ? [0, h] : [placed.top, placed.size[0]];
  const columns = letterbox ? [0, w] : [placed.left, placed.size[1]];
  const heightFirst = turns && h < image.height && image.height - h > 2 * (image.width - w);
  let pixels = opaque(image, channels);
  for (const axis of heightFirst ? ['rows', 'columns'] : ['columns', 'rows']) {
    pixels = axis === 'rows'
      ? resizeAxis(pixels, false, h, recipe.interpolation, ...rows)
      : resizeAxis(pixels, true, w, recipe.interpolation, ...columns);
  }
  const [height, width] = placed.size;
  const input = new Float32Array(channels * height * width);
  const f = Math.fround;
  for (let c = 0; c < channels; c++) {
    const from = recipe.channels === 'BGR' && channels === 3 ? 2 - c : c;
    const mean = f(recipe.mean[c]);
    const std = f(recipe.std[c]);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const py = letterbox ? y + placed.top : y;
        const px = letterbox ? x + placed.left : x;
        const inside = py >= 0 && px >= 0 && py < pixels.height && px < pixels.width;
        const value = inside ? pixels.data[(py * pixels.width + px) * channels + from] : recipe.fill;
        input[(c * height + y) * width + x] = f(f(f(value / 255) - mean) / std);
      }
    }
  }
  return {input, placed};
}

// An upright ImageData of a file's bytes, without colour management.
export async function decode(blob) {
  const options = {colorSpaceConversion: 'none', premultiplyAlpha: 'none', imageOrientation: 'from-image'};
  const bitmap = await createImageBitmap(blob, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
