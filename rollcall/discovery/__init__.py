"""From a registry to gRPC: each process tells its own C core, over xDS, which instances a service has."""
