// A client as Go programmers write it, by net/rpc/jsonrpc alone. It prints what it found as JSON.
//
//	client check HOST:PORT                              every kind of call and of error, once
//	client load HOST:PORT CONNECTIONS CALLERS SECONDS   as many calls as the server answers in that time
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net/rpc"
	"net/rpc/jsonrpc"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const concurrent = 1000

func main() {
	var found map[string]any
	switch os.Args[1] {
	case "check":
		found = check(dial(os.Args[2]))
	case "load":
		found = load(os.Args[2], number(os.Args[3]), number(os.Args[4]), number(os.Args[5]))
	default:
		log.Fatalf("expected check or load, found %q", os.Args[1])
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}

func check(client *rpc.Client) map[string]any {
	found := map[string]any{}
	call := func(method string, argument any) string {
		var reply string
		if err := client.Call(method, argument, &reply); err != nil {
			return "error: " + err.Error()
		}
		return reply
	}
	names := []string{"李白", "", "\"\\\n\t</>&\u2028", "𝄞 \u0000 é", "{[}]"}
	for _, name := range names {
		found["hello "+name] = call("hello.HelloWorld", name)
	}
	big := strings.Repeat("白\"", 100_000)
	found["big"] = call("hello.HelloWorld", big) == big+" 你好"
	found["no method"] = call("hello.Nothing", "x")
	found["no service"] = call("nobody.HelloWorld", "x")
	found["ill-formed"] = call("HelloWorld", "x")
	found["number"] = call("hello.HelloWorld", 5)
	found["object"] = call("hello.HelloWorld", map[string]int{"a": 1})
	found["null"] = call("hello.HelloWorld", nil)

	calls := make([]*rpc.Call, concurrent)
	for i := range calls {
		calls[i] = client.Go("hello.HelloWorld", strconv.Itoa(i), new(string), make(chan *rpc.Call, 1))
	}
	right := 0
	for i, each := range calls {
		done := <-each.Done
		if done.Error == nil && *done.Reply.(*string) == fmt.Sprintf("%d 你好", i) {
			right++
		}
	}
	found["concurrent"] = right
	found["after all"] = call("hello.HelloWorld", "李白")
	if err := client.Close(); err != nil {
		log.Fatal(err)
	}
	return found
}

func load(address string, connections, callers, seconds float64) map[string]any {
	var calls, failed atomic.Int64
	var group sync.WaitGroup
	clients := make([]*rpc.Client, int(connections))
	for i := range clients {
		clients[i] = dial(address)
	}
	until := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	for i := range int(callers) {
		client := clients[i%len(clients)]
		group.Add(1)
		go func() {
			defer group.Done()
			for time.Now().Before(until) {
				var reply string
				if err := client.Call("hello.HelloWorld", "李白", &reply); err != nil || reply != "李白 你好" {
					failed.Add(1)
				}
				calls.Add(1)
			}
		}()
	}
	group.Wait()
	return map[string]any{"calls": calls.Load(), "failed": failed.Load()}
}

func dial(address string) *rpc.Client {
	client, err := jsonrpc.Dial("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	return client
}

func number(text string) float64 {
	parsed, err := strconv.ParseFloat(text, 64)
	if err != nil {
		log.Fatal(err)
	}
	return parsed
}
