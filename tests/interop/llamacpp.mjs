// llama.cpp on a CPU, through node-llama-cpp's prebuilt binaries: what it makes of texts and tokens, as JSON.
// stdin: {model, texts: [string], windows: [[id]], greedy: {prompt, n}}; logits of windows are raw float32 in the file `logits`.
import {readFileSync, appendFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const {getLlama} = await import(pathToFileURL(createRequire(process.cwd() + "/").resolve("node-llama-cpp")));
const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: asked.threads});
const model = await llama.loadModel({modelPath: asked.model, gpuLayers: 0});
const longest = Math.max(64, ...asked.windows.map((ids) => ids.length));
const context = await model.createContext({contextSize: longest, batchSize: longest, threads: asked.threads});
const sequence = context.getSequence();

async function logitsOf(ids) {
    await sequence.clearHistory();
    const found = await sequence.controlledEvaluate(ids.map((id) => [id, {generateNext: {logits: true}}]));
    return found.map(({next}) => {
        const row = new Float32Array(next.logits.size);
        for (const [id, logit] of next.logits) row[id] = logit;
        return row;
    });
}

function largest(row) {
    return row.reduce((best, logit, id) => (logit > row[best] ? id : best), 0);
}

function nll(row, id) {
    const top = row[largest(row)];
    return top + Math.log(row.reduce((sum, logit) => sum + Math.exp(logit - top), 0)) - row[id];
}

if (asked.logits) writeFileSync(asked.logits, "");
const nlls = [];
const tops = [];
for (const ids of asked.windows) {
    const rows = await logitsOf(ids);
    nlls.push(ids.slice(1).map((id, i) => nll(rows[i], id)));
    tops.push(rows.map(largest));
    if (asked.logits) for (const row of rows) appendFileSync(asked.logits, Buffer.from(row.buffer));
}

const greedy = [];
if (asked.greedy) {
    const ids = [...model.tokenize(asked.greedy.prompt)];
    for (let i = 0; i < asked.greedy.n; i++) {
        const rows = await logitsOf([...ids, ...greedy]);
        greedy.push(largest(rows.at(-1)));
    }
}

const tokens = asked.texts.map((text) => [...model.tokenize(text)]);
const facts = {bos: model.tokens.bos, eos: model.tokens.eos, addBos: model.tokens.shouldPrependBosToken};
process.stdout.write(JSON.stringify({tokens, nlls, tops, greedy, text: model.detokenize(greedy), facts}) + "\n");
process.exit(0);
