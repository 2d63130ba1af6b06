// Trains an adapter on one answer and samples from it. README.md says how to run it; docs/other-languages.md has the rules that
// the numbered calls follow.
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "google/rpc/code.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "mintrpc/v1/model.grpc.pb.h"
#include "mintrpc/v1/sampler.grpc.pb.h"
#include "mintrpc/v1/trainer.grpc.pb.h"

using namespace mintrpc::v1;
using namespace std::chrono_literals;
using std::chrono::system_clock;

constexpr size_t kMostSteps = 32;
constexpr double kLearningRate = 0.002;
constexpr double kLearned = 0.1;  // of the first loss
constexpr auto kPatience = 120s;  // with one call
constexpr auto kCallLimit = 30s;  // any will do: what has not come by then is asked for again
constexpr auto kPause = 100ms;

// The server's own word, and final.
struct Refused : std::runtime_error {
  explicit Refused(const std::string& message) : std::runtime_error(message) {}
  std::string code, reason, field;
  int64_t next_sequence = 0;  // 0: not recorded
};

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::string content_of_file_in(const char* name) {
  const std::string path = environment(name);
  if (path.empty()) return "";
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(name) + ": cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A channel to the HOST:PORT, http://HOST:PORT or https://HOST:PORT in a variable.
std::shared_ptr<grpc::Channel> connect(const std::string& variable) {
  const std::string address = environment(variable.c_str());
  if (address.empty())
    throw std::runtime_error(variable + " is not set; it says where the server is, such as 127.0.0.1:50051");
  const size_t scheme = address.find("://");
  const std::string target = scheme == std::string::npos ? address : address.substr(scheme + 3);
  auto credentials = grpc::InsecureChannelCredentials();
  if (address.rfind("https://", 0) == 0) {
    grpc::SslCredentialsOptions tls;
    tls.pem_root_certs = content_of_file_in("MINT_TLS_CA");
    tls.pem_cert_chain = content_of_file_in("MINT_TLS_CERT");
    tls.pem_private_key = content_of_file_in("MINT_TLS_KEY");
    credentials = grpc::SslCredentials(tls);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

// How long to wait before the same request is sent again. Throws Refused if that is no use.
std::chrono::milliseconds pause_after(const grpc::Status& error) {
  google::rpc::Status status;
  status.ParseFromString(error.error_details());
  google::rpc::ErrorInfo info;
  google::rpc::BadRequest bad;
  google::rpc::RetryInfo retry;
  for (const auto& detail : status.details()) {
    if (detail.UnpackTo(&retry))
      return std::chrono::milliseconds(retry.retry_delay().seconds() * 1000 + retry.retry_delay().nanos() / 1000000);
    if (!detail.UnpackTo(&info)) detail.UnpackTo(&bad);
  }
  if (info.domain() != "mint" || error.error_code() == grpc::StatusCode::UNAVAILABLE) return kPause;
  const auto next = info.metadata().find("next_sequence");
  Refused refused(info.reason() + ": " + error.error_message());
  refused.code = google::rpc::Code_Name(static_cast<google::rpc::Code>(error.error_code()));
  refused.reason = info.reason();
  if (bad.field_violations_size()) refused.field = bad.field_violations(0).field();
  if (next != info.metadata().end()) refused.next_sequence = std::stoll(next->second);
  throw refused;
}

// Makes a call until it ends well. Throws Refused.
void insist(const std::function<grpc::Status(grpc::ClientContext*)>& call) {
  const std::string key = environment("MINT_API_KEY");
  for (const auto until = system_clock::now() + kPatience;;) {
    grpc::ClientContext context;
    context.set_deadline(system_clock::now() + kCallLimit);
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    const grpc::Status status = call(&context);
    if (status.ok()) return;
    const auto pause = pause_after(status);  // throws what is final
    if (system_clock::now() + pause > until) throw std::runtime_error(status.error_message());
    std::cerr << "again in " << pause.count() << " ms: " << status.error_message() << std::endl;
    std::this_thread::sleep_for(pause);
  }
}

template <typename Stub, typename Request, typename Answer>
using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Request&, Answer*);

// Sends a request until there is an answer. Throws Refused.
template <typename Stub, typename Request, typename Answer>
Answer ask(Stub* stub, Method<Stub, Request, Answer> method, const Request& request) {
  Answer answer;
  insist([&](grpc::ClientContext* context) { return (stub->*method)(context, request, &answer); });
  return answer;
}

std::string random_id() {
  std::random_device device;
  std::string id;
  for (int i = 0; i < 4; ++i) id += std::to_string(device()) + "-";
  return id;
}

// A training run, whose calls go one after the other.
class Run {
 public:
  explicit Run(TrainerService::Stub* stub) : stub_(stub) {
    CreateTrainingRunRequest request;
    request.set_request_id(random_id());
    request.mutable_lora_config()->set_rank(4);
    request.mutable_lora_config()->set_seed(7);
    const auto answer = ask(stub, &TrainerService::Stub::CreateTrainingRun, request);
    id_ = answer.training_run().training_run_id();
    writer_epoch_ = answer.writer_epoch();
  }

  // Gives a request its number and sends it. Throws Refused.
  template <typename Request, typename Answer>
  Answer send(Method<TrainerService::Stub, Request, Answer> method, Request request) {
    request.set_training_run_id(id_);
    request.set_writer_epoch(writer_epoch_);
    request.set_sequence(next_sequence_);
    request.set_acknowledged_sequence(next_sequence_ - 1);
    try {
      Answer answer = ask(stub_, method, request);
      ++next_sequence_;
      return answer;
    } catch (const Refused& error) {
      // An error that names no next number is not recorded, and has used none up.
      if (error.next_sequence) next_sequence_ = error.next_sequence;
      throw;
    }
  }

 private:
  TrainerService::Stub* stub_;
  std::string id_;
  int64_t writer_epoch_ = 0;
  int64_t next_sequence_ = 1;
};

using Tokens = std::vector<int32_t>;

void fill(ModelInput* input, const Tokens& tokens) {
  input->add_chunks()->mutable_encoded_text()->mutable_tokens()->Add(tokens.begin(), tokens.end());
}

// Little-endian, whatever this machine is.
template <typename Bits>
void append(std::string* bytes, Bits bits) {
  for (size_t i = 0; i < sizeof(Bits); ++i) bytes->push_back(static_cast<char>(bits >> (8 * i)));
}

ForwardBackwardRequest backward(const Tokens& tokens, const Tokens& targets, const std::vector<float>& weights) {
  ForwardBackwardRequest request;
  request.mutable_cross_entropy();
  Datum* datum = request.add_data();
  fill(datum->mutable_model_input(), tokens);
  TensorData& target_tokens = (*datum->mutable_loss_fn_inputs())["target_tokens"];
  target_tokens.set_dtype(TENSOR_DTYPE_INT64);
  target_tokens.add_shape(targets.size());
  for (const int32_t target : targets) append(target_tokens.mutable_values(), static_cast<uint64_t>(target));
  TensorData& given_weights = (*datum->mutable_loss_fn_inputs())["weights"];
  given_weights.set_dtype(TENSOR_DTYPE_FLOAT32);
  given_weights.add_shape(weights.size());
  for (const float weight : weights) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    append(given_weights.mutable_values(), bits);
  }
  return request;
}

// A server that starts answers before it knows its model.
void wait_for_model(ModelService::Stub* model) {
  const auto until = system_clock::now() + kPatience;
  while (!ask(model, &ModelService::Stub::GetServerCapabilities, {}).base_models_size()) {
    if (system_clock::now() > until) throw std::runtime_error("the server has no base model");
    std::this_thread::sleep_for(kPause);
  }
}

using Message = std::pair<std::string, std::string>;  // role and content

// A conversation as tokens.
RenderedChat render(ModelService::Stub* model, RenderChatRequest request, const std::vector<Message>& messages) {
  request.set_renderer("role_colon");
  Chat* chat = request.add_chats();
  for (const auto& [role, content] : messages) {
    ChatMessage* message = chat->add_messages();
    message->set_role(role);
    message->set_content(content);
  }
  return ask(model, &ModelService::Stub::RenderChat, request).chats(0);
}

struct Trained {
  std::vector<double> losses;
  Refused refused;
  std::string path;  // of the weights
};

Refused refusal(Run* run, const ForwardBackwardRequest& request) {
  try {
    run->send(&TrainerService::Stub::ForwardBackward, request);
  } catch (const Refused& error) {
    return error;
  }
  throw std::runtime_error("the server took a token that there is not");
}

Trained train(TrainerService::Stub* stub, const RenderedChat& rendered) {
  const Tokens tokens(rendered.tokens().begin(), rendered.tokens().end() - 1);
  Tokens targets(rendered.tokens().begin() + 1, rendered.tokens().end());
  const std::vector<float> weights(rendered.weights().begin() + 1, rendered.weights().end());
  Run run(stub);
  std::vector<double> losses;
  OptimStepRequest step;
  step.mutable_adam_params()->set_learning_rate(kLearningRate);
  while (losses.empty() || losses.back() > kLearned * losses.front()) {
    if (losses.size() == kMostSteps) throw std::runtime_error("the loss has not fallen to a tenth of the first");
    const auto passed = run.send(&TrainerService::Stub::ForwardBackward, backward(tokens, targets, weights));
    losses.push_back(passed.metrics().at("loss:sum"));
    run.send(&TrainerService::Stub::OptimStep, step);
    std::cerr << "step " << losses.size() << ": loss " << losses.back() << std::endl;
  }
  targets[0] = 2000000000;
  const Refused refused = refusal(&run, backward(tokens, targets, weights));
  run.send(&TrainerService::Stub::DiscardGradient, DiscardGradientRequest());
  SaveWeightsForSamplerRequest save;
  save.set_name("final");
  return {losses, refused, run.send(&TrainerService::Stub::SaveWeightsForSampler, save).path()};
}

SampleRequest sample_request(const std::string& path, const RenderedChat& prompt) {
  SampleRequest request;
  request.set_model_path(path);
  fill(request.mutable_prompt(), Tokens(prompt.tokens().begin(), prompt.tokens().end()));
  request.mutable_sampling_params()->set_temperature(0);
  request.mutable_sampling_params()->set_max_tokens(8);
  request.mutable_sampling_params()->set_seed(1);
  return request;
}

// The tokens of a stream. One that breaks off is asked for again from its start.
Tokens stream(SamplerService::Stub* stub, const SampleRequest& wanted) {
  StreamSampleRequest request;
  *request.mutable_sample() = wanted;
  Tokens tokens;
  insist([&](grpc::ClientContext* context) {
    tokens.clear();
    const auto pieces = stub->StreamSample(context, request);
    for (StreamSampleResponse piece; pieces->Read(&piece);)
      tokens.insert(tokens.end(), piece.tokens().begin(), piece.tokens().end());
    return pieces->Finish();
  });
  return tokens;
}

template <typename Numbers>
void set_numbers(google::protobuf::Value* value, const Numbers& numbers) {
  for (const auto number : numbers) value->mutable_list_value()->add_values()->set_number_value(number);
}

void work() {
  const auto trainer = connect("MINT_BASE_URL");
  const auto sampler = connect("MINT_SAMPLER_URL");
  const auto model = ModelService::NewStub(trainer);
  const auto samples = SamplerService::NewStub(sampler);
  wait_for_model(model.get());

  const Message question = {"user", "What is 2 + 3?"};
  RenderChatRequest with_weights, for_an_answer;
  with_weights.set_train_on_what(TRAIN_ON_WHAT_ALL_ASSISTANT_MESSAGES);
  for_an_answer.set_add_generation_prompt(true);
  const auto conversation = render(model.get(), with_weights, {question, {"assistant", "5"}});
  const Trained trained = train(TrainerService::NewStub(trainer).get(), conversation);

  const auto wanted = sample_request(trained.path, render(model.get(), for_an_answer, {question}));
  const auto whole = ask(samples.get(), &SamplerService::Stub::Sample, wanted).sequences(0).tokens();
  DetokenizeRequest detokenize;
  *detokenize.add_sequences()->mutable_tokens() = whole;

  google::protobuf::Struct outcome;
  auto& fields = *outcome.mutable_fields();
  set_numbers(&fields["losses"], trained.losses);
  auto& refused = *fields["refused"].mutable_struct_value()->mutable_fields();
  refused["code"].set_string_value(trained.refused.code);
  refused["reason"].set_string_value(trained.refused.reason);
  refused["field"].set_string_value(trained.refused.field);
  set_numbers(&fields["tokens"], whole);
  set_numbers(&fields["streamed"], stream(samples.get(), wanted));
  fields["text"].set_string_value(ask(model.get(), &ModelService::Stub::Detokenize, detokenize).texts(0));
  std::string line;
  if (!google::protobuf::util::MessageToJsonString(outcome, &line).ok()) throw std::runtime_error("no JSON");
  std::cout << line << std::endl;
}

int main() {
  try {
    work();
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
