"""The cloud server: a large diffusers pipeline behind a gRPC stream. Deployed apart from the edge."""
