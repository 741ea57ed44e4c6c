// llama.cpp through node-llama-cpp, on a CPU; its kernels round activations to 8 bit. Task and answer: protocol.py.

import {appendFileSync, readdirSync, readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const require = createRequire(join(process.cwd(), "package.json"));
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const [folder, taskFile, output] = process.argv.slice(2);
const task = JSON.parse(readFileSync(taskFile, "utf8"));
const file = readdirSync(folder).find((name) => name.endsWith(".gguf"));
const threads = Number(process.env.OMP_NUM_THREADS ?? 1);

const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: threads});
const model = await llama.loadModel({modelPath: join(folder, file), gpuLayers: 0});
const longest = Math.max(64, ...task.windows.map((window) => window.length));
const context = await model.createContext({contextSize: longest, batchSize: longest, threads});
const sequence = context.getSequence();

// Rows of logits, after each of some tokens that follow what was evaluated before.
async function evaluate(ids) {
    const told = await sequence.controlledEvaluate(ids.map((id) => [id, {generateNext: {logits: true}}]));
    return told.map(({next}) => {
        const row = new Float32Array(next.logits.size);
        for (const [id, logit] of next.logits) row[id] = logit;
        return row;
    });
}

async function greedy(prompt, n) {
    await sequence.clearHistory();
    const found = [];
    for (let ids = prompt; found.length < n; ids = found.slice(-1)) {
        const row = (await evaluate(ids)).at(-1);
        found.push(row.reduce((best, logit, id) => (logit > row[best] ? id : best), 0));
    }
    return found;
}

// numpy's format 1.0: magic, version, length of the header, header padded to 64 bytes.
function npyHeader(shape) {
    const fields = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
    const header = fields.padEnd(Math.ceil((fields.length + 11) / 64) * 64 - 11) + "\n";
    const length = Buffer.alloc(2);
    length.writeUInt16LE(header.length);
    return Buffer.concat([Buffer.from("\x93NUMPY\x01\x00", "latin1"), length, Buffer.from(header, "latin1")]);
}

for (const [i, window] of task.windows.entries()) {
    await sequence.clearHistory();
    const rows = await evaluate(window);
    const logits = join(output, "logits.npy");
    if (i === 0) writeFileSync(logits, npyHeader([task.windows.length, window.length, rows[0].length]));
    for (const row of rows) appendFileSync(logits, Buffer.from(row.buffer));
}

const {version} = JSON.parse(readFileSync(join(process.cwd(), "node_modules/node-llama-cpp/package.json"), "utf8"));
const answer = {
    greedy: await greedy(task.prompt, task.n_new),
    logprobs: null,
    layers: model.typeDescription,
    tokens: (task.texts ?? []).map((text) => [...model.tokenize(text)]),
    versions: {"node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release},
};
writeFileSync(join(output, "answer.json"), JSON.stringify(answer));
process.exit(0);
