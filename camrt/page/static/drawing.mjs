// Maps as pictures, and as files.

// (x - min) / (max - min); a constant map becomes zeros.
export function scaled(map) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of map) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const span = high - low;
  return Float32Array.from(map, (value) => (span > 0 ? (value - low) / span : 0));
}

export function colourTable(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// A map (h, w) in [0, 1] as a canvas of its size.
function coloured(values, [height, width], table) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  for (let i = 0; i < values.length; i++) {
    const level = 3 * Math.floor(Math.min(1, Math.max(0, values[i])) * 255 + 0.5);
    image.data.set([table[level], table[level + 1], table[level + 2], 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Draws the photo over the whole canvas and the map over the part that the network saw; the rest is darkened.
// picture: a canvas of the photo; map: {values in [0, 1], size: [h, w]} or null; placed: see pixels.mjs.
export function draw(canvas, picture, map, placed, table, opacity) {
  const context = canvas.getContext('2d');
  const {width, height} = canvas;
  context.imageSmoothingQuality = 'high';
  context.globalAlpha = 1;
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height); // transparent pixels lie on white, as in Python
  context.drawImage(picture, 0, 0, width, height);
  if (!map) return;
  const [resizedHeight, resizedWidth] = placed.resized;
  const seen = {
    x: (placed.left * width) / resizedWidth,
    y: (placed.top * height) / resizedHeight,
    width: (placed.size[1] * width) / resizedWidth,
    height: (placed.size[0] * height) / resizedHeight,
  };
  context.save();
  context.beginPath();
  context.rect(0, 0, width, height);
  context.clip();
  context.globalAlpha = opacity;
  context.drawImage(coloured(map.values, map.size, table), seen.x, seen.y, seen.width, seen.height);
  context.globalAlpha = 0.65;
  context.fillStyle = '#000';
  context.beginPath();
  context.rect(0, 0, width, height);
  context.rect(seen.x, seen.y, seen.width, seen.height);
  context.fill('evenodd');
  context.restore();
}

// The colours from the map's lowest value to its highest.
export function scale(canvas, table) {
  canvas.width = 256;
  canvas.height = 1;
  canvas.getContext('2d').drawImage(coloured(Float32Array.from({length: 256}, (_, i) => i / 255), [1, 256], table), 0, 0);
}

// A NumPy file of float32 numbers.
export function npy(values, shape) {
  const said = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(', ')},), }`;
  const length = Math.ceil((10 + said.length + 1) / 64) * 64;
  const header = new Uint8Array(length).fill(0x20);
  header.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, (length - 10) & 255, (length - 10) >> 8]);
  header.set(new TextEncoder().encode(said), 10);
  header[length - 1] = 0x0a;
  return new Blob([header, Float32Array.from(values)], {type: 'application/octet-stream'});
}

export function download(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
