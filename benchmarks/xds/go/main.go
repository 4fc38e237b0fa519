// Command xds-bench has the two halves of the xDS benchmark that are not Python: go-control-plane as a
// management server, and the Envoys that connect to either server.
//
// Both halves take commands from standard input, a line each, and answer with a line of JSON.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"syscall"
)

func main() {
	var err error
	switch {
	case len(os.Args) < 2:
		err = fmt.Errorf("usage: xds-bench serve|load [flags]")
	case os.Args[1] == "serve":
		err = serve(os.Args[2:])
	case os.Args[1] == "load":
		err = load(os.Args[2:])
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// answer writes one line of JSON.
func answer(fields map[string]any) error {
	return json.NewEncoder(os.Stdout).Encode(fields)
}

// cpuMilliseconds returns the user and system time of this process.
func cpuMilliseconds() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e6
}
