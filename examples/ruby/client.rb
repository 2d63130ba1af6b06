# Trains an adapter on one answer, publishes it and samples from it. README.md says what it reads and prints.

$LOAD_PATH.unshift(File.join(__dir__, 'build'))

require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'google/rpc/status_pb'
require 'grpc'
require 'json'
require 'securerandom'
require 'mintrpc/v1/model_services_pb'
require 'mintrpc/v1/sampler_services_pb'
require 'mintrpc/v1/trainer_services_pb'

include Mintrpc::V1

QUESTION = ChatMessage.new(role: 'user', content: 'What is 2 + 3?')
ANSWER = ChatMessage.new(role: 'assistant', content: '5')
MOST_STEPS = 32
LEARNING_RATE = 0.002
LEARNED = 0.1 # of the first loss
DEADLINE_S = 60 # of one attempt; the next one finds the call where it is by then
MOMENT_S = 0.5

# What the server itself has said against a call.
class Refused < StandardError
  attr_reader :code, :details

  def initialize(error, details)
    super("#{error.code} #{error.details}")
    @code = error.code
    @details = details
  end

  # A refusal that is recorded has used the number up, and says so.
  def next_sequence
    @details[:info].metadata['next_sequence']&.to_i
  end
end

# One service at the address in a variable, HOST:PORT or http(s)://HOST:PORT.
class Service
  def initialize(kind, variable, otherwise)
    url = ENV.fetch(variable, otherwise)
    options = {
      'grpc.keepalive_time_ms' => 30_000,
      'grpc.max_receive_message_length' => -1, # the server keeps to its own `max_message_bytes`
      'grpc.max_reconnect_backoff_ms' => 5_000
    }
    credentials = url.start_with?('https://') ? tls : :this_channel_is_insecure
    @stub = kind.new(url.sub(%r{\Ahttps?://}, ''), credentials, channel_args: options)
    @headers = ENV['MINT_API_KEY'] ? { 'authorization' => "Bearer #{ENV['MINT_API_KEY']}" } : {}
  end

  # Sends until the server itself has answered: any error that does not carry its ErrorInfo says nothing about the call. A block
  # reads a stream, from its beginning each time.
  def call(rpc, request)
    answer = @stub.public_send(rpc, request, deadline: Time.now + DEADLINE_S, metadata: @headers)
    block_given? ? yield(answer) : answer
  rescue GRPC::BadStatus => e
    details = details_of(e)
    ours = details[:info]&.domain == 'mint'
    raise Refused.new(e, details) if ours && !details[:retry] && !e.is_a?(GRPC::Unavailable)

    warn "again: #{e.code} #{e.details}"
    sleep(ours && details[:retry] ? details[:retry].retry_delay.to_f : MOMENT_S)
    retry
  end

  private

  def tls
    cert = ENV['MINT_TLS_CERT']
    files = [ENV['MINT_TLS_CA'], cert && ENV.fetch('MINT_TLS_KEY'), cert]
    GRPC::Core::ChannelCredentials.new(*files.map { |file| file && File.read(file) })
  end

  def details_of(error)
    packed = error.metadata['grpc-status-details-bin']
    all = packed ? Google::Rpc::Status.decode(packed).details : []
    kinds = { info: Google::Rpc::ErrorInfo, retry: Google::Rpc::RetryInfo, bad: Google::Rpc::BadRequest }
    kinds.transform_values { |kind| all.find { |any| any.is(kind) }&.unpack(kind) }
  end
end

# A training run, whose calls are numbered: see the rule of numbers in docs/other-languages.md.
class Run
  def initialize(trainer)
    @trainer = trainer
    config = LoraConfig.new(rank: 4, seed: 7)
    request = CreateTrainingRunRequest.new(request_id: SecureRandom.uuid, lora_config: config)
    created = trainer.call(:create_training_run, request)
    @id = created.training_run.training_run_id
    @writer_epoch = created.writer_epoch
    @sequence = 1
  end

  # Numbers a request, sends it until the server itself has answered, and goes on to the next number.
  def call(rpc, request)
    request.training_run_id = @id
    request.writer_epoch = @writer_epoch
    request.sequence = @sequence
    request.acknowledged_sequence = @sequence - 1 # one call at a time: the one before has its answer
    answer = @trainer.call(rpc, request)
    @sequence += 1
    answer
  rescue Refused => e
    @sequence = e.next_sequence || @sequence
    raise
  end
end

def render(model, messages, **options)
  request = RenderChatRequest.new(chats: [Chat.new(messages: messages)], renderer: 'role_colon', **options)
  model.call(:render_chat, request).chats[0]
end

def input(tokens)
  ModelInput.new(chunks: [ModelInputChunk.new(encoded_text: EncodedTextChunk.new(tokens: tokens))])
end

def tensor(dtype, values, packing)
  TensorData.new(dtype: dtype, shape: [values.size], values: values.pack(packing))
end

# A pass over the conversation, each token but the last predicting the next one.
def backward(tokens, targets, weights)
  inputs = {
    'target_tokens' => tensor(:TENSOR_DTYPE_INT64, targets, 'q<*'),
    'weights' => tensor(:TENSOR_DTYPE_FLOAT32, weights, 'e*')
  }
  datum = Datum.new(model_input: input(tokens[0..-2]), loss_fn_inputs: inputs)
  ForwardBackwardRequest.new(data: [datum], cross_entropy: CrossEntropy.new)
end

# Steps until the answer is learned: the loss of each.
def learn(run, tokens, targets, weights)
  losses = []
  until losses.any? && losses.last <= LEARNED * losses.first
    raise "the loss has not fallen to a tenth of the first: #{losses}" if losses.size == MOST_STEPS

    losses << run.call(:forward_backward, backward(tokens, targets, weights)).metrics['loss:sum']
    run.call(:optim_step, OptimStepRequest.new(adam_params: AdamParams.new(learning_rate: LEARNING_RATE)))
    warn format('step %d: loss %.3f', losses.size, losses.last)
  end
  losses
end

# Sends what must be refused, and tells of it.
def refusal(run, request)
  run.call(:forward_backward, request)
  raise 'the server took a target token that is in no vocabulary'
rescue Refused => e
  code = GRPC::Core::StatusCodes.constants.find { |name| GRPC::Core::StatusCodes.const_get(name) == e.code }
  { code: code, reason: e.details[:info].reason, field: e.details[:bad].field_violations[0].field }
end

def main
  model = Service.new(ModelService::Stub, 'MINT_BASE_URL', '127.0.0.1:50051')
  trainer = Service.new(TrainerService::Stub, 'MINT_BASE_URL', '127.0.0.1:50051')
  sampler = Service.new(SamplerService::Stub, 'MINT_SAMPLER_URL', '127.0.0.1:50052')

  # The base model is not named before the server has loaded it.
  sleep MOMENT_S while model.call(:get_server_capabilities, GetServerCapabilitiesRequest.new).base_models.empty?

  lesson = render(model, [QUESTION, ANSWER], train_on_what: :TRAIN_ON_WHAT_ALL_ASSISTANT_MESSAGES)
  tokens = lesson.tokens.to_a
  targets = tokens[1..]
  weights = lesson.weights.to_a[1..]
  run = Run.new(trainer)
  losses = learn(run, tokens, targets, weights)
  refused = refusal(run, backward(tokens, targets[0..-2] + [2_000_000_000], weights))
  run.call(:discard_gradient, DiscardGradientRequest.new)
  path = run.call(:save_weights_for_sampler, SaveWeightsForSamplerRequest.new(name: 'final')).path

  prompt = render(model, [QUESTION], add_generation_prompt: true)
  params = SamplingParams.new(temperature: 0, max_tokens: 8, seed: 1)
  sample = SampleRequest.new(model_path: path, prompt: input(prompt.tokens.to_a), sampling_params: params)
  sampled = sampler.call(:sample, sample).sequences[0].tokens.to_a
  streamed = sampler.call(:stream_sample, StreamSampleRequest.new(sample: sample)) do |parts|
    parts.flat_map { |part| part.tokens.to_a }
  end
  sequences = [TokenSequence.new(tokens: sampled)]
  text = model.call(:detokenize, DetokenizeRequest.new(sequences: sequences)).texts[0]

  puts JSON.generate(losses: losses, refused: refused, tokens: sampled, streamed: streamed, text: text)
end

main
