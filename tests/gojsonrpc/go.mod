module rollcall/gojsonrpc

go 1.22
