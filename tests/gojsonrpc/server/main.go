// A server as Go programmers write it, by net/rpc/jsonrpc alone. It prints the port that it listens on.
package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/rpc"
	"net/rpc/jsonrpc"
	"time"
)

type Hello struct{}

func (Hello) HelloWorld(name string, reply *string) error {
	*reply = name + " 你好"
	return nil
}

type Trial struct{}

type Point struct {
	X, Y int
}

// Fail returns what it is given as an error.
func (Trial) Fail(text string, _ *string) error {
	return errors.New(text)
}

// Slow answers after so many milliseconds, with them.
func (Trial) Slow(milliseconds int, reply *int) error {
	time.Sleep(time.Duration(milliseconds) * time.Millisecond)
	*reply = milliseconds
	return nil
}

// Mirror takes and returns a struct.
func (Trial) Mirror(point Point, reply *Point) error {
	*reply = Point{X: point.Y, Y: point.X}
	return nil
}

func main() {
	for name, object := range map[string]any{"hello": Hello{}, "trial": Trial{}} {
		if err := rpc.RegisterName(name, object); err != nil {
			log.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go jsonrpc.ServeConn(connection)
	}
}
