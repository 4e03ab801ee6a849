// The network, in a worker, so that the page stays responsive. Messages: {id, call, args} -> {id, result} or {id, error}.

let site;
let ort;
let provider;
let weights;
let current; // {id, network, finish, held}

function threads() {
  return self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
}

async function withProgress(url, total) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: the server answers ${response.status}`);
  const reader = response.body.getReader();
  const parts = [];
  let done = 0;
  for (;;) {
    const {value, done: end} = await reader.read();
    if (end) break;
    parts.push(value);
    done += value.length;
    self.postMessage({progress: Math.min(1, done / total)});
  }
  const data = new Uint8Array(done);
  let at = 0;
  for (const part of parts) {
    data.set(part, at);
    at += part.length;
  }
  return data;
}

async function load(file, providers, external) {
  const model = new Uint8Array(await (await fetch(file)).arrayBuffer());
  return ort.InferenceSession.create(model, {
    executionProviders: providers,
    graphOptimizationLevel: 'all',
    externalData: external ? [{path: 'weights.bin', data: weights}] : [],
  });
}

function tensor(data, dims) {
  return new ort.Tensor(data instanceof BigInt64Array ? 'int64' : 'float32', data, dims);
}

const calls = {
  // Loads the runtime and the weights. wanted: 'webgpu' or 'wasm'; returns which of them runs.
  async open(wanted) {
    site = await (await fetch('site.json')).json();
    provider = wanted;
    ort = await import(`./ort/ort.${provider}.min.mjs`);
    ort.env.wasm.wasmPaths = new URL('ort/', self.location.href).href;
    ort.env.wasm.numThreads = threads();
    ort.env.logLevel = 'error';
    weights ??= await withProgress('model/weights.bin', site.weights);
    return {provider, threads: threads()};
  },

  // Opens a method's programs and closes those of the one before.
  async choose(id) {
    if (current?.id === id) return;
    const method = site.methods.find((m) => m.id === id);
    const before = current;
    current = undefined;
    await before?.network.release();
    await before?.finish?.release();
    const network = await load(method.file, provider === 'webgpu' ? ['webgpu', 'wasm'] : ['wasm'], true);
    const finish = method.finish ? await load(method.finish, ['wasm'], false) : undefined;
    current = {id, network, finish};
  },

  // Runs the network; target -1 is the top class. Returns logits, and map and layerWeights of methods without a slider.
  async run(input, target) {
    const feeds = {
      image: tensor(input, [1, ...site.input_shape]),
      target: tensor(BigInt64Array.of(BigInt(target)), [1]),
    };
    const {logits, map, layer_weights: layerWeights, ...held} = await current.network.run(feeds);
    current.held = Object.fromEntries(Object.entries(held).map(([name, t]) => [name, tensor(t.data, t.dims)]));
    return {logits: logits.data, map: map?.data, layerWeights: layerWeights?.data};
  },

  // The map of the last run at another percentile, without the network.
  async retune(percentile) {
    const feeds = {...current.held, percentile: tensor(Float32Array.of(percentile), [1])};
    const {map, layer_weights: layerWeights} = await current.finish.run(feeds);
    return {map: map.data, layerWeights: layerWeights.data};
  },
};

let queue = Promise.resolve(); // one call after another: a session cannot run twice at once

self.onmessage = ({data: {id, call, args}}) => {
  queue = queue.then(async () => {
    try {
      self.postMessage({id, result: await calls[call](...args)});
    } catch (error) {
      self.postMessage({id, error: error?.message ?? String(error)});
    }
  });
};
