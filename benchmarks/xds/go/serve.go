package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// patience is how long a change may take until all have acknowledged it.
const patience = 60 * time.Second

// world is what all Envoys get, by type URL and name.
type world map[string]map[string]types.Resource

// store is one of go-control-plane's caches.
type store interface {
	cache() cache.Cache
	// prepare does what need not be in the time of a change, and returns what is.
	prepare(resource types.Resource) (func() error, error)
}

// serve runs go-control-plane. Commands: "begin" begins to count ACKs; "acks N" answers when N have come;
// "change I N" begins to count, puts the cluster I of the other form in, and answers when N have come.
func serve(arguments []string) error {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	kind := flags.String("cache", "snapshot", "snapshot or linear")
	worldFile := flags.String("world", "", "file with a DiscoveryResponse: all resources")
	changedFile := flags.String("changed", "", "file with a DiscoveryResponse: clusters in another form")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	all, _, err := read(*worldFile)
	if err != nil {
		return err
	}
	_, changed, err := read(*changedFile)
	if err != nil {
		return err
	}
	var of store
	if *kind == "linear" {
		of = newLinear(all)
	} else if of, err = newSnapshots(all); err != nil {
		return err
	}
	acks := &counter{}
	callbacks := server.CallbackFuncs{
		StreamRequestFunc: func(_ int64, request *discovery.DiscoveryRequest) error {
			acks.note(request.ResponseNonce != "" && request.ErrorDetail == nil)
			return nil
		},
		StreamDeltaRequestFunc: func(_ int64, request *discovery.DeltaDiscoveryRequest) error {
			acks.note(request.ResponseNonce != "" && request.ErrorDetail == nil)
			return nil
		},
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	grpcServer := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	ads := server.NewServer(context.Background(), of.cache(), callbacks)
	discovery.RegisterAggregatedDiscoveryServiceServer(grpcServer, ads)
	go func() { panic(grpcServer.Serve(listener)) }()
	if err := answer(map[string]any{"port": listener.Addr().(*net.TCPAddr).Port}); err != nil {
		return err
	}

	// A cluster is put in in its other form, and the next time as it was.
	original := map[string]types.Resource{}
	for _, each := range changed {
		name := cache.GetResourceName(each)
		original[name] = all[resource.ClusterType][name]
	}
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		var command string
		var first, second int
		if _, err := fmt.Sscan(commands.Text(), &command, &first, &second); err != nil && command == "change" {
			return err
		}
		switch command {
		case "begin":
			acks.begin()
			err = answer(map[string]any{"ready": true})
		case "acks":
			err = acks.answer(first, map[string]any{})
		case "change":
			index := first % len(changed)
			next := changed[index]
			if first/len(changed)%2 == 1 {
				next = original[cache.GetResourceName(next)]
			}
			apply, err := of.prepare(next)
			if err != nil {
				return err
			}
			acks.begin()
			begin := time.Now()
			if err := apply(); err != nil {
				return err
			}
			err = acks.answer(second, map[string]any{
				"begin_ns":   begin.UnixNano(),
				"publish_ms": float64(time.Since(begin).Nanoseconds()) / 1e6,
			})
		}
		if err != nil {
			return err
		}
	}
	return commands.Err()
}

// read returns the resources of a file, by name and in their order.
func read(file string) (world, []types.Resource, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	var response discovery.DiscoveryResponse
	if err := proto.Unmarshal(data, &response); err != nil {
		return nil, nil, err
	}
	all := world{}
	var inOrder []types.Resource
	for _, body := range response.Resources {
		message, err := body.UnmarshalNew()
		if err != nil {
			return nil, nil, err
		}
		if all[body.TypeUrl] == nil {
			all[body.TypeUrl] = map[string]types.Resource{}
		}
		all[body.TypeUrl][cache.GetResourceName(message)] = message
		inOrder = append(inOrder, message)
	}
	return all, inOrder, nil
}

// snapshots serves a world by the snapshot cache; all nodes share one snapshot.
type snapshots struct {
	of      cache.SnapshotCache
	world   world
	version map[string]int
}

type oneGroup struct{}

func (oneGroup) ID(*core.Node) string { return "group" }

func newSnapshots(all world) (*snapshots, error) {
	found := &snapshots{cache.NewSnapshotCache(true, oneGroup{}, nil), all, map[string]int{}}
	next, err := found.snapshot()
	if err != nil {
		return nil, err
	}
	return found, found.of.SetSnapshot(context.Background(), "group", next)
}

func (s *snapshots) cache() cache.Cache { return s.of }

func (s *snapshots) snapshot() (*cache.Snapshot, error) {
	next := &cache.Snapshot{}
	for typeURL, byName := range s.world {
		index := cache.GetResponseType(typeURL)
		if index == types.UnknownType {
			return nil, fmt.Errorf("the snapshot cache has no type %s", typeURL)
		}
		resources := make([]types.Resource, 0, len(byName))
		for _, each := range byName {
			resources = append(resources, each)
		}
		// A version for each type, so that a changed cluster does not send the other types again.
		next.Resources[index] = cache.NewResources(strconv.Itoa(s.version[typeURL]), resources)
	}
	return next, nil
}

func (s *snapshots) prepare(changed types.Resource) (func() error, error) {
	s.world[resource.ClusterType][cache.GetResourceName(changed)] = changed
	s.version[resource.ClusterType]++
	next, err := s.snapshot()
	return func() error { return s.of.SetSnapshot(context.Background(), "group", next) }, err
}

// linear serves a world by linear caches, one for each type.
type linear struct {
	mux      *cache.MuxCache
	clusters *cache.LinearCache
}

func newLinear(all world) *linear {
	mux := &cache.MuxCache{
		Classify:      func(request *cache.Request) string { return request.GetTypeUrl() },
		ClassifyDelta: func(request *cache.DeltaRequest) string { return request.GetTypeUrl() },
		Caches:        map[string]cache.Cache{},
	}
	for typeURL, byName := range all {
		mux.Caches[typeURL] = cache.NewLinearCache(typeURL, cache.WithInitialResources(byName))
	}
	return &linear{mux, mux.Caches[resource.ClusterType].(*cache.LinearCache)}
}

func (l *linear) cache() cache.Cache { return l.mux }

func (l *linear) prepare(changed types.Resource) (func() error, error) {
	name := changed.(*cluster.Cluster).Name
	return func() error { return l.clusters.UpdateResource(name, changed) }, nil
}

// counter counts ACKs.
type counter struct {
	mutex   sync.Mutex
	came    []int64
	began   float64
	wanted  int
	reached chan struct{}
}

func (c *counter) begin() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.came, c.began, c.wanted = nil, cpuMilliseconds(), 0
}

func (c *counter) note(isACK bool) {
	if !isACK {
		return
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.came = append(c.came, time.Now().UnixNano())
	if len(c.came) == c.wanted {
		close(c.reached)
	}
}

// answer waits for so many ACKs, and says when the last came and what CPU time was used since begin.
func (c *counter) answer(count int, fields map[string]any) error {
	c.mutex.Lock()
	c.wanted, c.reached = count, make(chan struct{})
	if len(c.came) >= count {
		close(c.reached)
	}
	c.mutex.Unlock()
	select {
	case <-c.reached:
	case <-time.After(patience):
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if len(c.came) >= count {
		fields["acknowledged_ns"] = c.came[count-1]
	} else {
		fields["missing"] = count - len(c.came)
	}
	fields["cpu_ms"] = cpuMilliseconds() - c.began
	return answer(fields)
}
