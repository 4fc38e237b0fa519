package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// subscription is what an Envoy asks for of one type; no names: all.
type subscription struct {
	TypeURL string   `json:"type_url"`
	Names   []string `json:"names"`
	// what the client has from before (delta)
	versions map[string]string
}

// fleet is many Envoys, each with a connection of its own. It looks at no resource, so that it is cheap.
type fleet struct {
	address       string
	delta         bool
	node          *core.Node
	subscriptions []*subscription
	first         [][]byte // the first requests of a stream, encoded

	streams   int
	resources int // of a stream that has everything
	bytes     atomic.Int64
	messages  atomic.Int64
	waiting   atomic.Int64 // streams that have not everything yet
	complete  chan int64
	failed    chan error
}

// load plays Envoys. Commands: "connect" connects all and answers when each has everything, and one response
// at least; "report" answers with the number and size of all responses. They disconnect at the end of the input.
func load(arguments []string) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	address := flags.String("address", "", "of the management server")
	streams := flags.Int("streams", 1, "how many Envoys")
	resources := flags.Int("resources", 0, "how many resources an Envoy gets")
	delta := flags.Bool("delta", false, "the incremental variant")
	file := flags.String("subscriptions", "", "JSON: what each asks for")
	nodeFile := flags.String("node", "", "JSON: the node message")
	learn := flags.Int("learn", 0, "come with so many resources of the first type from an earlier stream (delta)")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	envoys := &fleet{
		address: *address, delta: *delta, streams: *streams, resources: *resources, node: &core.Node{},
	}
	data, err := os.ReadFile(*file)
	if err == nil {
		err = json.Unmarshal(data, &envoys.subscriptions)
	}
	if err != nil {
		return err
	}
	if data, err = os.ReadFile(*nodeFile); err == nil {
		err = protojson.Unmarshal(data, envoys.node)
	}
	if err != nil {
		return err
	}
	if *learn > 0 {
		if err := envoys.learn(*learn); err != nil {
			return err
		}
	}
	if err := envoys.encode(); err != nil {
		return err
	}
	if err := answer(map[string]any{"ready": true}); err != nil {
		return err
	}
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		switch commands.Text() {
		case "connect":
			err = envoys.connect()
		case "report":
			err = answer(map[string]any{
				"bytes":    envoys.bytes.Load(),
				"messages": envoys.messages.Load(),
				"cpu_ms":   cpuMilliseconds(),
			})
		}
		if err != nil {
			return err
		}
	}
	return commands.Err()
}

func (f *fleet) connect() error {
	f.waiting.Store(int64(f.streams))
	f.complete = make(chan int64, 1)
	f.failed = make(chan error, f.streams)
	begin := time.Now().UnixNano()
	for range f.streams {
		go func() { f.failed <- f.run() }()
	}
	fields := map[string]any{"begin_ns": begin}
	select {
	case fields["complete_ns"] = <-f.complete:
		fields["messages"] = f.messages.Load()
	case err := <-f.failed:
		return err
	case <-time.After(patience):
		fields["missing"] = f.waiting.Load()
	}
	return answer(fields)
}

func (f *fleet) open(ctx context.Context) (*grpc.ClientConn, grpc.ClientStream, error) {
	connection, err := grpc.NewClient(
		"passthrough:///"+f.address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// Envoy's own windows.
		grpc.WithInitialWindowSize(16<<20),
		grpc.WithInitialConnWindowSize(24<<20),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(1<<30)),
	)
	if err != nil {
		return nil, nil, err
	}
	method := "StreamAggregatedResources"
	if f.delta {
		method = "DeltaAggregatedResources"
	}
	description := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	path := "/envoy.service.discovery.v3.AggregatedDiscoveryService/" + method
	stream, err := connection.NewStream(ctx, description, path)
	return connection, stream, errors.Join(err)
}

// run is one Envoy: it asks, and acknowledges whatever comes.
func (f *fleet) run() error {
	connection, stream, err := f.open(context.Background())
	if err != nil {
		return err
	}
	defer connection.Close()
	for _, request := range f.first {
		if err := stream.SendMsg(request); err != nil {
			return err
		}
	}
	for resources, isComplete := 0, false; ; {
		var got response
		if err := stream.RecvMsg(&got); err != nil {
			return err
		}
		f.messages.Add(1)
		f.bytes.Add(int64(got.size))
		ack, err := f.acknowledge(&got)
		if err != nil {
			return err
		}
		if err := stream.SendMsg(ack); err != nil {
			return err
		}
		resources += got.resources
		if !isComplete && resources >= f.resources {
			isComplete = true
			if f.waiting.Add(-1) == 0 {
				f.complete <- time.Now().UnixNano()
			}
		}
	}
}

// encode makes the requests that each stream begins with.
func (f *fleet) encode() error {
	for index, each := range f.subscriptions {
		var node *core.Node
		if index == 0 {
			node = f.node
		}
		var request proto.Message = &discovery.DiscoveryRequest{
			Node: node, TypeUrl: each.TypeURL, ResourceNames: each.Names,
		}
		if f.delta {
			request = &discovery.DeltaDiscoveryRequest{
				Node: node, TypeUrl: each.TypeURL, ResourceNamesSubscribe: each.Names,
				InitialResourceVersions: each.versions,
			}
		}
		data, err := proto.Marshal(request)
		if err != nil {
			return err
		}
		f.first = append(f.first, data)
	}
	return nil
}

func (f *fleet) acknowledge(got *response) ([]byte, error) {
	if f.delta {
		return proto.Marshal(&discovery.DeltaDiscoveryRequest{TypeUrl: got.typeURL, ResponseNonce: got.nonce})
	}
	for _, each := range f.subscriptions {
		if each.TypeURL == got.typeURL {
			return proto.Marshal(&discovery.DiscoveryRequest{
				TypeUrl: got.typeURL, ResourceNames: each.Names, VersionInfo: got.version, ResponseNonce: got.nonce,
			})
		}
	}
	return nil, fmt.Errorf("a response of type %q", got.typeURL)
}

// learn finds out what a client has of the first type when everything was sent to it.
func (f *fleet) learn(count int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	connection, stream, err := f.open(ctx)
	if err != nil {
		return err
	}
	defer connection.Close()
	of := f.subscriptions[0]
	request, err := proto.Marshal(&discovery.DeltaDiscoveryRequest{Node: f.node, TypeUrl: of.TypeURL})
	if err != nil {
		return err
	}
	of.versions = map[string]string{}
	for len(of.versions) < count {
		if err := stream.SendMsg(request); err != nil {
			return err
		}
		got := response{keep: true}
		if err := stream.RecvMsg(&got); err != nil {
			return err
		}
		var decoded discovery.DeltaDiscoveryResponse
		if err := proto.Unmarshal(got.data, &decoded); err != nil {
			return err
		}
		for _, member := range decoded.Resources {
			of.versions[member.Name] = member.Version
		}
		if request, err = f.acknowledge(&got); err != nil {
			return err
		}
	}
	return stream.CloseSend()
}

// response is what is read of a DiscoveryResponse or a DeltaDiscoveryResponse; their numbers are the same.
type response struct {
	version, typeURL, nonce string
	size                    int
	resources               int
	keep                    bool // data is wanted
	data                    []byte
}

// codec hands requests through, and skips the resources of responses.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(value any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(value.([]byte))}, nil
}

func (codec) Unmarshal(data mem.BufferSlice, value any) error {
	got := value.(*response)
	got.size = data.Len()
	if got.keep {
		got.data = data.Materialize()
	}
	rest := &cursor{buffers: data}
	for !rest.done() {
		number, kind := protowire.DecodeTag(rest.varint())
		if kind != protowire.BytesType {
			return fmt.Errorf("field %d of a response is of wire type %d", number, kind)
		}
		length := int(rest.varint())
		switch number {
		case 1:
			got.version = string(rest.take(length))
		case 4:
			got.typeURL = string(rest.take(length))
		case 5:
			got.nonce = string(rest.take(length))
		case 2:
			got.resources++
			rest.skip(length)
		default:
			rest.skip(length)
		}
	}
	return nil
}

// cursor goes through a message that lies in several buffers.
type cursor struct {
	buffers mem.BufferSlice
	offset  int
}

func (c *cursor) done() bool {
	for len(c.buffers) > 0 && c.offset == c.buffers[0].Len() {
		c.buffers, c.offset = c.buffers[1:], 0
	}
	return len(c.buffers) == 0
}

func (c *cursor) varint() uint64 {
	var encoded []byte
	for {
		next := c.take(1)[0]
		encoded = append(encoded, next)
		if next < 0x80 {
			value, _ := protowire.ConsumeVarint(encoded)
			return value
		}
	}
}

func (c *cursor) take(length int) []byte {
	taken := make([]byte, 0, length)
	for len(taken) < length && !c.done() {
		part := c.buffers[0].ReadOnlyData()[c.offset:]
		part = part[:min(len(part), length-len(taken))]
		taken = append(taken, part...)
		c.offset += len(part)
	}
	return taken
}

func (c *cursor) skip(length int) {
	for length > 0 && !c.done() {
		step := min(length, c.buffers[0].Len()-c.offset)
		c.offset += step
		length -= step
	}
}
