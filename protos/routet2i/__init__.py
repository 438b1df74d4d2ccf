"""Messages and services of the edge agent and the cloud server, generated from the .proto files beside."""
