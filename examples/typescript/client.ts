// Trains an adapter on one answer and samples from it. README.md says how to run it; docs/other-languages.md has the rules that
// the numbered calls follow.
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient, type Client, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { Code as StatusCode } from "./gen/google/rpc/code_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { type ChatMessageSchema, ModelService, type RenderedChat, TrainOnWhat } from "./gen/mintrpc/v1/model_pb.js";
import { SamplerService, type SampleRequestSchema } from "./gen/mintrpc/v1/sampler_pb.js";
import { type ForwardBackwardRequestSchema, TrainerService } from "./gen/mintrpc/v1/trainer_pb.js";
import { type ModelInputSchema, TensorDtype } from "./gen/mintrpc/v1/types_pb.js";

const MOST_STEPS = 32;
const LEARNING_RATE = 0.002;
const LEARNED = 0.1; // of the first loss
const PATIENCE_MS = 120_000; // with one call
const PAUSE_MS = 100;
const OPTIONS = { timeoutMs: 30_000 }; // any will do: what has not come by then is asked for again

/** The server's own word, and final. */
class Refused extends Error {
  constructor(
    message: string,
    readonly code: string,
    readonly reason: string,
    readonly field: string,
    readonly nextSequence: string | undefined, // undefined: not recorded
  ) {
    super(`${reason}: ${message}`);
  }
}

const withKey: Interceptor = (next) => (request) => {
  const key = process.env.MINT_API_KEY;
  if (key) request.header.set("authorization", `Bearer ${key}`);
  return next(request);
};

/** A connection to the HOST:PORT, http://HOST:PORT or https://HOST:PORT in a variable. */
function connect(variable: string) {
  const address = process.env[variable];
  if (!address) throw new Error(`${variable} is not set; it says where the server is, such as 127.0.0.1:50051`);
  const baseUrl = address.includes("://") ? address : `http://${address}`;
  const pem = (name: string) => (process.env[name] ? readFileSync(process.env[name]) : undefined);
  const tls = { ca: pem("MINT_TLS_CA"), cert: pem("MINT_TLS_CERT"), key: pem("MINT_TLS_KEY") };
  const sessionManager = new Http2SessionManager(baseUrl, { pingIntervalMs: 30_000 }, baseUrl.startsWith("https:") ? tls : {});
  const transport = createGrpcTransport({ baseUrl, interceptors: [withKey], sessionManager });
  return { transport, close: () => sessionManager.abort() };
}

/** Makes a call until there is an answer. Throws Refused. */
async function insist<A>(call: () => Promise<A>): Promise<A> {
  for (const until = Date.now() + PATIENCE_MS; ; ) {
    try {
      return await call();
    } catch (reason) {
      const error = ConnectError.from(reason);
      const pause = pauseMs(error); // throws what is final
      if (Date.now() + pause > until) throw error;
      console.error(`again in ${pause} ms: ${error.message}`);
      await sleep(pause);
    }
  }
}

/** How long to wait before the same request is sent again. Throws Refused if that is no use. */
function pauseMs(error: ConnectError): number {
  const [retry] = error.findDetails(RetryInfoSchema);
  if (retry) return Number(retry.retryDelay?.seconds ?? 0n) * 1000 + (retry.retryDelay?.nanos ?? 0) / 1e6;
  const [info] = error.findDetails(ErrorInfoSchema);
  if (info?.domain !== "mint" || error.code === Code.Unavailable) return PAUSE_MS;
  const [bad] = error.findDetails(BadRequestSchema);
  const field = bad?.fieldViolations[0]?.field ?? "";
  throw new Refused(error.rawMessage, StatusCode[error.code], info.reason, field, info.metadata.next_sequence);
}

/** The place of a sequenced call. */
interface Place {
  trainingRunId: string;
  writerEpoch: bigint;
  sequence: bigint;
  acknowledgedSequence: bigint;
}

/** A training run, whose calls go one after the other. */
class Run {
  private nextSequence = 1n;

  private constructor(
    private readonly trainingRunId: string,
    private readonly writerEpoch: bigint,
  ) {}

  static async create(trainer: Client<typeof TrainerService>): Promise<Run> {
    const requestId = randomUUID();
    const source = { case: "loraConfig", value: { rank: 4, seed: 7n } } as const;
    const { trainingRun, writerEpoch } = await insist(() => trainer.createTrainingRun({ requestId, source }, OPTIONS));
    return new Run(trainingRun!.trainingRunId, writerEpoch);
  }

  /** Gives a call its number and makes it. */
  async send<A>(call: (place: Place) => Promise<A>): Promise<A> {
    const { trainingRunId, writerEpoch, nextSequence: sequence } = this;
    try {
      const answer = await insist(() => call({ trainingRunId, writerEpoch, sequence, acknowledgedSequence: sequence - 1n }));
      this.nextSequence = sequence + 1n;
      return answer;
    } catch (error) {
      // An error that names no next number is not recorded, and has used none up.
      if (error instanceof Refused && error.nextSequence) this.nextSequence = BigInt(error.nextSequence);
      throw error;
    }
  }
}

function modelInput(tokens: number[]): MessageInitShape<typeof ModelInputSchema> {
  return { chunks: [{ chunk: { case: "encodedText", value: { tokens } } }] };
}

function tensor(dtype: TensorDtype, values: number[]) {
  const size = dtype === TensorDtype.INT64 ? 8 : 4;
  const view = new DataView(new ArrayBuffer(size * values.length));
  values.forEach((value, i) => {
    if (dtype === TensorDtype.INT64) view.setBigInt64(size * i, BigInt(value), true);
    else view.setFloat32(size * i, value, true);
  });
  return { dtype, shape: [BigInt(values.length)], values: new Uint8Array(view.buffer) };
}

/** What a backward reads: targets[i] is what follows after tokens[i]. */
function batch(tokens: number[], targets: number[], weights: number[]): MessageInitShape<typeof ForwardBackwardRequestSchema> {
  const lossFnInputs = {
    target_tokens: tensor(TensorDtype.INT64, targets),
    weights: tensor(TensorDtype.FLOAT32, weights),
  };
  return { data: [{ modelInput: modelInput(tokens), lossFnInputs }], lossFn: { case: "crossEntropy", value: {} } };
}

/** A server that starts answers before it knows its model. */
async function waitForModel(model: Client<typeof ModelService>) {
  for (const until = Date.now() + PATIENCE_MS; ; await sleep(PAUSE_MS)) {
    const { baseModels } = await insist(() => model.getServerCapabilities({}, OPTIONS));
    if (baseModels.length > 0) return;
    if (Date.now() > until) throw new Error("the server has no base model");
  }
}

/** A conversation as tokens. */
async function render(
  model: Client<typeof ModelService>,
  messages: MessageInitShape<typeof ChatMessageSchema>[],
  options: { trainOnWhat?: TrainOnWhat; addGenerationPrompt?: boolean },
): Promise<RenderedChat> {
  const request = { ...options, chats: [{ messages }], renderer: "role_colon" };
  return (await insist(() => model.renderChat(request, OPTIONS))).chats[0];
}

/** The losses, the refusal of what is wrong, and the path of the weights. */
async function train(trainer: Client<typeof TrainerService>, { tokens, weights }: RenderedChat) {
  const run = await Run.create(trainer);
  const backward = (targets: number[]) => {
    const content = batch(tokens.slice(0, -1), targets, weights.slice(1));
    return run.send((place) => trainer.forwardBackward({ ...place, ...content }, OPTIONS));
  };
  const losses: number[] = [];
  for (let loss = Infinity; losses.length === 0 || loss > LEARNED * losses[0]; ) {
    if (losses.length === MOST_STEPS) throw new Error(`the loss has not fallen to a tenth of the first: ${losses}`);
    loss = (await backward(tokens.slice(1))).metrics["loss:sum"];
    losses.push(loss);
    await run.send((place) => trainer.optimStep({ ...place, adamParams: { learningRate: LEARNING_RATE } }, OPTIONS));
    console.error(`step ${losses.length}: loss ${loss.toFixed(3)}`);
  }
  const refused = await backward([2_000_000_000, ...tokens.slice(2)]).catch((error) => error);
  if (!(refused instanceof Refused)) throw refused;
  await run.send((place) => trainer.discardGradient(place, OPTIONS));
  const { path } = await run.send((place) => trainer.saveWeightsForSampler({ ...place, name: "final" }, OPTIONS));
  const { code, reason, field } = refused;
  return { losses, refused: { code, reason, field }, path };
}

/** The same tokens, as a whole and as they come. */
async function sample(sampler: Client<typeof SamplerService>, modelPath: string, prompt: number[]) {
  const request: MessageInitShape<typeof SampleRequestSchema> = {
    modelPath,
    prompt: modelInput(prompt),
    samplingParams: { temperature: 0, maxTokens: 8, seed: 1n },
  };
  const whole = await insist(() => sampler.sample(request, OPTIONS));
  // A stream that breaks off is asked for again from its start.
  const streamed = await insist(async () => {
    const tokens: number[] = [];
    for await (const piece of sampler.streamSample({ sample: request }, OPTIONS)) tokens.push(...piece.tokens);
    return tokens;
  });
  return { tokens: whole.sequences[0].tokens, streamed };
}

const trainer = connect("MINT_BASE_URL");
const sampler = connect("MINT_SAMPLER_URL");
const model = createClient(ModelService, trainer.transport);
await waitForModel(model);
const question = { role: "user", content: "What is 2 + 3?" };
const answer = { role: "assistant", content: "5" };
const conversation = await render(model, [question, answer], { trainOnWhat: TrainOnWhat.ALL_ASSISTANT_MESSAGES });
const { losses, refused, path } = await train(createClient(TrainerService, trainer.transport), conversation);
const prompt = await render(model, [question], { addGenerationPrompt: true });
const { tokens, streamed } = await sample(createClient(SamplerService, sampler.transport), path, prompt.tokens);
const { texts } = await insist(() => model.detokenize({ sequences: [{ tokens }] }, OPTIONS));
console.log(JSON.stringify({ losses, refused, tokens, streamed, text: texts[0] }));
trainer.close();
sampler.close();
