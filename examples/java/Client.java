import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.AbstractStub;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import java.util.function.BiFunction;
import java.util.function.Function;
import mintrpc.v1.AdamParams;
import mintrpc.v1.Chat;
import mintrpc.v1.ChatMessage;
import mintrpc.v1.CreateTrainingRunRequest;
import mintrpc.v1.CreateTrainingRunResponse;
import mintrpc.v1.CrossEntropy;
import mintrpc.v1.Datum;
import mintrpc.v1.DetokenizeRequest;
import mintrpc.v1.DiscardGradientRequest;
import mintrpc.v1.EncodedTextChunk;
import mintrpc.v1.ForwardBackwardRequest;
import mintrpc.v1.GetServerCapabilitiesRequest;
import mintrpc.v1.LoraConfig;
import mintrpc.v1.ModelInput;
import mintrpc.v1.ModelInputChunk;
import mintrpc.v1.ModelServiceGrpc;
import mintrpc.v1.ModelServiceGrpc.ModelServiceBlockingStub;
import mintrpc.v1.OptimStepRequest;
import mintrpc.v1.RenderChatRequest;
import mintrpc.v1.RenderedChat;
import mintrpc.v1.SampleRequest;
import mintrpc.v1.SamplerServiceGrpc;
import mintrpc.v1.SamplerServiceGrpc.SamplerServiceBlockingStub;
import mintrpc.v1.SamplingParams;
import mintrpc.v1.SaveWeightsForSamplerRequest;
import mintrpc.v1.StreamSampleRequest;
import mintrpc.v1.TensorData;
import mintrpc.v1.TensorDtype;
import mintrpc.v1.TokenSequence;
import mintrpc.v1.TrainOnWhat;
import mintrpc.v1.TrainerServiceGrpc;
import mintrpc.v1.TrainerServiceGrpc.TrainerServiceBlockingStub;

/** Trains an adapter on one answer, publishes it and samples from it. README.md says what it reads and prints. */
public final class Client {
  static final ChatMessage QUESTION = ChatMessage.newBuilder().setRole("user").setContent("What is 2 + 3?").build();
  static final ChatMessage ANSWER = ChatMessage.newBuilder().setRole("assistant").setContent("5").build();

  public static void main(String[] args) throws Exception {
    ManagedChannel trainer = connect("MINT_BASE_URL", "127.0.0.1:50051");
    ManagedChannel sampler = connect("MINT_SAMPLER_URL", "127.0.0.1:50052");
    ModelServiceBlockingStub model = withKey(ModelServiceGrpc.newBlockingStub(trainer));
    awaitModel(model);
    RenderedChat lesson = render(model, chat().addChats(Chat.newBuilder().addMessages(QUESTION).addMessages(ANSWER)));
    Run run = Run.create(withKey(TrainerServiceGrpc.newBlockingStub(trainer)));

    List<Double> losses = learn(run, lesson);
    Map<String, String> refused = refusal(run, backward(lesson, 2_000_000_000));
    run.call(DiscardGradientRequest.getDefaultInstance(), TrainerServiceBlockingStub::discardGradient);
    String path = run.call(
        SaveWeightsForSamplerRequest.newBuilder().setName("final").build(),
        TrainerServiceBlockingStub::saveWeightsForSampler).getPath();

    RenderedChat prompt = render(model, chat().addChats(Chat.newBuilder().addMessages(QUESTION)).setAddGenerationPrompt(true));
    SampleRequest request = SampleRequest.newBuilder()
        .setModelPath(path)
        .setPrompt(input(prompt.getTokensList()))
        .setSamplingParams(SamplingParams.newBuilder().setTemperature(0).setMaxTokens(8).setSeed(1))
        .build();
    SamplerServiceBlockingStub sampling = withKey(SamplerServiceGrpc.newBlockingStub(sampler));
    List<Integer> tokens = answered(sampling, stub -> stub.sample(request)).getSequences(0).getTokensList();
    List<Integer> streamed = answered(sampling, stub -> stream(stub, request));
    var sequence = TokenSequence.newBuilder().addAllTokens(tokens);
    var texts = DetokenizeRequest.newBuilder().addSequences(sequence).build();
    String text = answered(model, stub -> stub.detokenize(texts)).getTexts(0);

    var told = Map.of("losses", losses, "refused", refused, "tokens", tokens, "streamed", streamed, "text", text);
    new PrintStream(System.out, true, StandardCharsets.UTF_8).println(new Gson().toJson(told));
    trainer.shutdownNow();
    sampler.shutdownNow();
  }

  /** The base model is not named before the server has loaded it. */
  static void awaitModel(ModelServiceBlockingStub model) throws Exception {
    var request = GetServerCapabilitiesRequest.getDefaultInstance();
    while (answered(model, stub -> stub.getServerCapabilities(request)).getBaseModelsCount() == 0) {
      Thread.sleep(MOMENT_MS);
    }
  }

  static RenderChatRequest.Builder chat() {
    return RenderChatRequest.newBuilder().setRenderer("role_colon");
  }

  static RenderedChat render(ModelServiceBlockingStub model, RenderChatRequest.Builder request) throws Exception {
    if (!request.getAddGenerationPrompt()) {
      request.setTrainOnWhat(TrainOnWhat.TRAIN_ON_WHAT_ALL_ASSISTANT_MESSAGES);
    }
    return answered(model, stub -> stub.renderChat(request.build())).getChats(0);
  }

  /** A pass over the conversation, each token but the last predicting the next one; `target`, unless -1, stands in place of the last. */
  static ForwardBackwardRequest backward(RenderedChat lesson, int target) {
    int last = lesson.getTokensCount() - 1;
    ByteBuffer targets = littleEndian(last * Long.BYTES);
    ByteBuffer weights = littleEndian(last * Float.BYTES);
    for (int i = 1; i <= last; i++) {
      targets.putLong(i == last && target >= 0 ? target : lesson.getTokens(i));
      weights.putFloat(lesson.getWeights(i));
    }
    var datum = Datum.newBuilder()
        .setModelInput(input(lesson.getTokensList().subList(0, last)))
        .putLossFnInputs("target_tokens", tensor(TensorDtype.TENSOR_DTYPE_INT64, last, targets))
        .putLossFnInputs("weights", tensor(TensorDtype.TENSOR_DTYPE_FLOAT32, last, weights));
    return ForwardBackwardRequest.newBuilder()
        .addData(datum).setCrossEntropy(CrossEntropy.getDefaultInstance()).build();
  }

  static ByteBuffer littleEndian(int bytes) {
    return ByteBuffer.allocate(bytes).order(ByteOrder.LITTLE_ENDIAN);
  }

  static TensorData tensor(TensorDtype dtype, int length, ByteBuffer values) {
    var bytes = ByteString.copyFrom(values.array());
    return TensorData.newBuilder().setDtype(dtype).addShape(length).setValues(bytes).build();
  }

  static ModelInput input(List<Integer> tokens) {
    var text = EncodedTextChunk.newBuilder().addAllTokens(tokens);
    return ModelInput.newBuilder().addChunks(ModelInputChunk.newBuilder().setEncodedText(text)).build();
  }

  static final int MOST_STEPS = 32;
  static final double LEARNING_RATE = 0.002;
  static final double LEARNED = 0.1; // of the first loss

  /** Steps until the answer is learned: the loss of each. */
  static List<Double> learn(Run run, RenderedChat lesson) throws Exception {
    List<Double> losses = new ArrayList<>();
    for (double loss = Double.MAX_VALUE; losses.isEmpty() || loss > LEARNED * losses.get(0); ) {
      if (losses.size() == MOST_STEPS) {
        throw new IllegalStateException("the loss has not fallen to a tenth of the first: " + losses);
      }
      loss = run.call(backward(lesson, -1), TrainerServiceBlockingStub::forwardBackward).getMetricsOrThrow("loss:sum");
      losses.add(loss);
      var adam = AdamParams.newBuilder().setLearningRate(LEARNING_RATE);
      run.call(OptimStepRequest.newBuilder().setAdamParams(adam).build(), TrainerServiceBlockingStub::optimStep);
      System.err.printf("step %d: loss %.3f%n", losses.size(), loss);
    }
    return losses;
  }

  /** Sends what must be refused, and tells of it. */
  static Map<String, String> refusal(Run run, ForwardBackwardRequest request) throws Exception {
    try {
      run.call(request, TrainerServiceBlockingStub::forwardBackward);
    } catch (Refused refused) {
      return Map.of(
          "code", refused.code.name(),
          "reason", refused.details.info().getReason(),
          "field", refused.details.bad().getFieldViolations(0).getField());
    }
    throw new IllegalStateException("the server took a target token that is in no vocabulary");
  }

  /** Begins anew wherever the stream breaks: the same seed gives the same tokens. */
  static List<Integer> stream(SamplerServiceBlockingStub stub, SampleRequest request) {
    List<Integer> tokens = new ArrayList<>();
    stub.streamSample(StreamSampleRequest.newBuilder().setSample(request).build())
        .forEachRemaining(part -> tokens.addAll(part.getTokensList()));
    return tokens;
  }

  /** A training run, whose calls are numbered: see the rule of numbers in docs/other-languages.md. */
  static final class Run {
    private final TrainerServiceBlockingStub trainer;
    private final String id;
    private final long writerEpoch;
    private long sequence = 1;

    private Run(TrainerServiceBlockingStub trainer, CreateTrainingRunResponse created) {
      this.trainer = trainer;
      this.id = created.getTrainingRun().getTrainingRunId();
      this.writerEpoch = created.getWriterEpoch();
    }

    static Run create(TrainerServiceBlockingStub trainer) throws Exception {
      var request = CreateTrainingRunRequest.newBuilder()
          .setRequestId(UUID.randomUUID().toString())
          .setLoraConfig(LoraConfig.newBuilder().setRank(4).setSeed(7))
          .build();
      return new Run(trainer, answered(trainer, stub -> stub.createTrainingRun(request)));
    }

    /** Numbers a request, sends it until the server itself has answered, and goes on to the next number. */
    @SuppressWarnings("unchecked") // a message's builder builds such a message
    <Q extends Message, A> A call(Q request, BiFunction<TrainerServiceBlockingStub, Q, A> rpc) throws Exception {
      Message.Builder numbered = request.toBuilder();
      set(numbered, "training_run_id", id);
      set(numbered, "writer_epoch", writerEpoch);
      set(numbered, "sequence", sequence);
      set(numbered, "acknowledged_sequence", sequence - 1); // one call at a time: the one before has its answer
      Q sent = (Q) numbered.build();
      try {
        A answer = answered(trainer, stub -> rpc.apply(stub, sent));
        sequence++;
        return answer;
      } catch (Refused refused) {
        sequence = refused.nextSequence(sequence);
        throw refused;
      }
    }

    private static void set(Message.Builder request, String field, Object value) {
      request.setField(request.getDescriptorForType().findFieldByName(field), value);
    }
  }

  static final long DEADLINE_S = 60; // of one attempt; the next one finds the call where it is by then
  static final long MOMENT_MS = 500;

  /** Sends until the server itself has answered: any error that does not carry its ErrorInfo says nothing about the call. */
  static <S extends AbstractStub<S>, A> A answered(S service, Function<S, A> rpc) throws Exception {
    while (true) {
      try {
        return rpc.apply(service.withDeadlineAfter(DEADLINE_S, TimeUnit.SECONDS));
      } catch (StatusRuntimeException error) {
        Details details = Details.of(error);
        boolean unavailable = error.getStatus().getCode() == Status.Code.UNAVAILABLE;
        if (details.ours() && details.retry() == null && !unavailable) {
          throw new Refused(error, details);
        }
        Throwable cause = error;
        while (cause.getCause() != null) {
          cause = cause.getCause();
        }
        System.err.println("again: " + cause.getMessage());
        Thread.sleep(details.waitMs());
      }
    }
  }

  /** What the server itself has said against a call. */
  static final class Refused extends RuntimeException {
    final Status.Code code;
    final Details details;

    Refused(StatusRuntimeException error, Details details) {
      super(error);
      this.code = error.getStatus().getCode();
      this.details = details;
    }

    /** A refusal that is recorded has used the number up, and says so. */
    long nextSequence(long own) {
      return Long.parseLong(details.info().getMetadataOrDefault("next_sequence", Long.toString(own)));
    }
  }

  /** Details of an error; each null where the error has none. */
  record Details(ErrorInfo info, RetryInfo retry, BadRequest bad) {
    static final Metadata.Key<byte[]> KEY = Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

    static Details of(StatusRuntimeException error) throws InvalidProtocolBufferException {
      Metadata trailers = error.getTrailers();
      byte[] packed = trailers == null ? null : trailers.get(KEY);
      List<Any> all = packed == null ? List.of() : com.google.rpc.Status.parseFrom(packed).getDetailsList();
      return new Details(first(all, ErrorInfo.class), first(all, RetryInfo.class), first(all, BadRequest.class));
    }

    private static <T extends Message> T first(List<Any> all, Class<T> kind) throws InvalidProtocolBufferException {
      for (Any any : all) {
        if (any.is(kind)) {
          return any.unpack(kind);
        }
      }
      return null;
    }

    boolean ours() {
      return info != null && info.getDomain().equals("mint");
    }

    long waitMs() {
      if (!ours() || retry == null) {
        return MOMENT_MS;
      }
      var delay = retry.getRetryDelay();
      return delay.getSeconds() * 1000 + delay.getNanos() / 1_000_000;
    }
  }

  /** A channel to the address in a variable, HOST:PORT or http(s)://HOST:PORT. */
  static ManagedChannel connect(String variable, String otherwise) throws IOException {
    String url = System.getenv().getOrDefault(variable, otherwise);
    ChannelCredentials credentials = url.startsWith("https://") ? tls() : InsecureChannelCredentials.create();
    return Grpc.newChannelBuilder(url.replaceFirst("^https?://", ""), credentials)
        .maxInboundMessageSize(Integer.MAX_VALUE) // the server keeps to its own `max_message_bytes`
        .keepAliveTime(30, TimeUnit.SECONDS)
        .build();
  }

  static ChannelCredentials tls() throws IOException {
    TlsChannelCredentials.Builder credentials = TlsChannelCredentials.newBuilder();
    String authorities = System.getenv("MINT_TLS_CA");
    String certificate = System.getenv("MINT_TLS_CERT");
    if (authorities != null) {
      credentials.trustManager(new File(authorities));
    }
    if (certificate != null) {
      credentials.keyManager(new File(certificate), new File(System.getenv("MINT_TLS_KEY")));
    }
    return credentials.build();
  }

  static <S extends AbstractStub<S>> S withKey(S stub) {
    Metadata headers = new Metadata();
    String key = System.getenv("MINT_API_KEY");
    if (key != null) {
      headers.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + key);
    }
    return stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
  }
}
