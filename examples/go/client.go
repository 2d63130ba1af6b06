// Trains an adapter on one answer and samples from it. README.md says how to run it; docs/other-languages.md has the rules that
// the numbered calls follow.
package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "mintrpc.example/mintrpc/v1"
)

const (
	mostSteps    = 32
	learningRate = 0.002
	learned      = 0.1              // of the first loss
	patience     = 2 * time.Minute  // with one call
	callLimit    = 30 * time.Second // any will do: what has not come by then is asked for again
	pause        = 100 * time.Millisecond
)

// refusal is the server's own word, and final.
type refusal struct {
	Code         string `json:"code"`
	Reason       string `json:"reason"`
	Field        string `json:"field"`
	message      string
	nextSequence string // empty: not recorded
}

func (r *refusal) Error() string { return r.Reason + ": " + r.message }

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

// dial opens a channel to the HOST:PORT, http://HOST:PORT or https://HOST:PORT in a variable.
func dial(variable string) *grpc.ClientConn {
	address := os.Getenv(variable)
	if address == "" {
		log.Fatalf("%s is not set; it says where the server is, such as 127.0.0.1:50051", variable)
	}
	options := []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: pause, Multiplier: 1.6, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
	if target := strings.TrimPrefix(address, "https://"); target != address {
		return must(grpc.Dial(target, append(options, grpc.WithTransportCredentials(tlsFromEnvironment()))...))
	}
	return must(grpc.Dial(strings.TrimPrefix(address, "http://"), append(options, grpc.WithInsecure())...))
}

func tlsFromEnvironment() credentials.TransportCredentials {
	config := &tls.Config{}
	if file := os.Getenv("MINT_TLS_CA"); file != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(must(os.ReadFile(file))) {
			log.Fatalf("MINT_TLS_CA: there is no certificate in %s", file)
		}
	}
	if file := os.Getenv("MINT_TLS_CERT"); file != "" {
		pair := must(tls.LoadX509KeyPair(file, os.Getenv("MINT_TLS_KEY")))
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config)
}

// insist sends a request until there is an answer, or the refusal that is returned.
func insist[Q, A any](call func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	for until := time.Now().Add(patience); ; {
		ctx, cancel := context.WithTimeout(context.Background(), callLimit)
		if key := os.Getenv("MINT_API_KEY"); key != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
		}
		answer, err := call(ctx, request)
		cancel()
		if err == nil {
			return answer, nil
		}
		refused, wait := judge(err)
		if refused != nil {
			return answer, refused
		}
		if time.Now().Add(wait).After(until) {
			return answer, err
		}
		log.Printf("again in %v: %v", wait, err)
		time.Sleep(wait)
	}
}

// judge says whether an error is final, or else how long to wait before the same request is sent again.
func judge(err error) (*refusal, time.Duration) {
	failed := status.Convert(err)
	refused := &refusal{Code: code.Code(failed.Code()).String(), message: failed.Message()}
	ours := false
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.RetryInfo:
			return nil, detail.RetryDelay.AsDuration()
		case *errdetails.ErrorInfo:
			ours = detail.Domain == "mint"
			refused.Reason, refused.nextSequence = detail.Reason, detail.Metadata["next_sequence"]
		case *errdetails.BadRequest:
			refused.Field = detail.FieldViolations[0].Field
		}
	}
	if !ours || failed.Code() == codes.Unavailable {
		return nil, pause
	}
	return refused, 0
}

// run is a training run, whose calls go one after the other.
type run struct {
	stub         pb.TrainerServiceClient
	id           string
	writerEpoch  int64
	nextSequence int64
}

func createRun(stub pb.TrainerServiceClient) *run {
	id := make([]byte, 16)
	must(rand.Read(id))
	answer := must(insist(stub.CreateTrainingRun, &pb.CreateTrainingRunRequest{
		RequestId: hex.EncodeToString(id),
		Source: &pb.CreateTrainingRunRequest_LoraConfig{
			LoraConfig: &pb.LoraConfig{Rank: 4, Seed: proto.Int64(7)},
		},
	}))
	return &run{stub, answer.TrainingRun.TrainingRunId, answer.WriterEpoch, 1}
}

// send gives a request its number and sends it.
func send[Q proto.Message, A any](r *run, call func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	message := request.ProtoReflect()
	set := func(name protoreflect.Name, value any) {
		message.Set(message.Descriptor().Fields().ByName(name), protoreflect.ValueOf(value))
	}
	set("training_run_id", r.id)
	set("writer_epoch", r.writerEpoch)
	set("sequence", r.nextSequence)
	set("acknowledged_sequence", r.nextSequence-1)
	answer, err := insist(call, request)
	if err == nil {
		r.nextSequence++
	} else if refused, ok := err.(*refusal); ok && refused.nextSequence != "" {
		// An error that names no next number is not recorded, and has used none up.
		r.nextSequence = must(strconv.ParseInt(refused.nextSequence, 10, 64))
	}
	return answer, err
}

func modelInput(tokens []int32) *pb.ModelInput {
	text := &pb.ModelInputChunk_EncodedText{EncodedText: &pb.EncodedTextChunk{Tokens: tokens}}
	return &pb.ModelInput{Chunks: []*pb.ModelInputChunk{{Chunk: text}}}
}

func forwardBackward(tokens, targets []int32, weights []float32) *pb.ForwardBackwardRequest {
	shape := []int64{int64(len(targets))}
	targetBytes, weightBytes := make([]byte, 8*len(targets)), make([]byte, 4*len(weights))
	for i := range targets {
		binary.LittleEndian.PutUint64(targetBytes[8*i:], uint64(targets[i]))
		binary.LittleEndian.PutUint32(weightBytes[4*i:], math.Float32bits(weights[i]))
	}
	return &pb.ForwardBackwardRequest{
		Data: []*pb.Datum{{
			ModelInput: modelInput(tokens),
			LossFnInputs: map[string]*pb.TensorData{
				"target_tokens": {Dtype: pb.TensorDtype_TENSOR_DTYPE_INT64, Shape: shape, Values: targetBytes},
				"weights":       {Dtype: pb.TensorDtype_TENSOR_DTYPE_FLOAT32, Shape: shape, Values: weightBytes},
			},
		}},
		LossFn: &pb.ForwardBackwardRequest_CrossEntropy{CrossEntropy: &pb.CrossEntropy{}},
	}
}

// waitForModel waits for a server that starts: it answers before it knows its model.
func waitForModel(model pb.ModelServiceClient) {
	for until := time.Now().Add(patience); ; time.Sleep(pause) {
		capabilities := must(insist(model.GetServerCapabilities, &pb.GetServerCapabilitiesRequest{}))
		if len(capabilities.BaseModels) > 0 {
			return
		}
		if time.Now().After(until) {
			log.Fatal("the server has no base model")
		}
	}
}

// render turns a conversation into tokens.
func render(model pb.ModelServiceClient, request *pb.RenderChatRequest, messages ...*pb.ChatMessage) *pb.RenderedChat {
	request.Chats = []*pb.Chat{{Messages: messages}}
	request.Renderer = "role_colon"
	return must(insist(model.RenderChat, request)).Chats[0]
}

// train returns the losses, the refusal of what is wrong, and the path of the weights.
func train(stub pb.TrainerServiceClient, rendered *pb.RenderedChat) ([]float64, *refusal, string) {
	n := len(rendered.Tokens)
	tokens, targets, weights := rendered.Tokens[:n-1], rendered.Tokens[1:], rendered.Weights[1:]
	r := createRun(stub)
	var losses []float64
	for len(losses) == 0 || losses[len(losses)-1] > learned*losses[0] {
		if len(losses) == mostSteps {
			log.Fatalf("the loss has not fallen to a tenth of the first: %v", losses)
		}
		passed := must(send(r, stub.ForwardBackward, forwardBackward(tokens, targets, weights)))
		losses = append(losses, passed.Metrics["loss:sum"])
		adam := &pb.AdamParams{LearningRate: proto.Float64(learningRate)}
		must(send(r, stub.OptimStep, &pb.OptimStepRequest{AdamParams: adam}))
		log.Printf("step %d: loss %.3f", len(losses), passed.Metrics["loss:sum"])
	}
	wrong := append([]int32{2000000000}, targets[1:]...)
	_, err := send(r, stub.ForwardBackward, forwardBackward(tokens, wrong, weights))
	refused, ok := err.(*refusal)
	if !ok {
		log.Fatalf("the server took a token that there is not: %v", err)
	}
	must(send(r, stub.DiscardGradient, &pb.DiscardGradientRequest{}))
	saved := must(send(r, stub.SaveWeightsForSampler, &pb.SaveWeightsForSamplerRequest{Name: "final"}))
	return losses, refused, saved.Path
}

// sample returns the same tokens, as a whole and as they come.
func sample(stub pb.SamplerServiceClient, path string, prompt []int32) ([]int32, []int32) {
	request := &pb.SampleRequest{
		ModelPath: path,
		Prompt:    modelInput(prompt),
		SamplingParams: &pb.SamplingParams{
			Temperature: proto.Float64(0), MaxTokens: proto.Int32(8), Seed: proto.Int64(1),
		},
	}
	whole := must(insist(stub.Sample, request)).Sequences[0].Tokens
	// A stream that breaks off is asked for again from its start.
	stream := func(ctx context.Context, request *pb.StreamSampleRequest, options ...grpc.CallOption) ([]int32, error) {
		pieces, err := stub.StreamSample(ctx, request, options...)
		if err != nil {
			return nil, err
		}
		tokens := []int32{}
		for {
			piece, err := pieces.Recv()
			if err == io.EOF {
				return tokens, nil
			}
			if err != nil {
				return nil, err
			}
			tokens = append(tokens, piece.Tokens...)
		}
	}
	return whole, must(insist(stream, &pb.StreamSampleRequest{Sample: request}))
}

func main() {
	log.SetFlags(0)
	trainer := dial("MINT_BASE_URL")
	defer trainer.Close()
	sampler := dial("MINT_SAMPLER_URL")
	defer sampler.Close()
	model := pb.NewModelServiceClient(trainer)
	waitForModel(model)

	question := &pb.ChatMessage{Role: "user", Content: "What is 2 + 3?"}
	answer := &pb.ChatMessage{Role: "assistant", Content: "5"}
	trained := &pb.RenderChatRequest{TrainOnWhat: pb.TrainOnWhat_TRAIN_ON_WHAT_ALL_ASSISTANT_MESSAGES}
	losses, refused, path := train(pb.NewTrainerServiceClient(trainer), render(model, trained, question, answer))

	prompt := render(model, &pb.RenderChatRequest{AddGenerationPrompt: true}, question)
	tokens, streamed := sample(pb.NewSamplerServiceClient(sampler), path, prompt.Tokens)
	told := must(insist(model.Detokenize, &pb.DetokenizeRequest{Sequences: []*pb.TokenSequence{{Tokens: tokens}}}))
	line := must(json.Marshal(struct {
		Losses   []float64 `json:"losses"`
		Refused  *refusal  `json:"refused"`
		Tokens   []int32   `json:"tokens"`
		Streamed []int32   `json:"streamed"`
		Text     string    `json:"text"`
	}{losses, refused, tokens, streamed, told.Texts[0]}))
	fmt.Println(string(line))
}
