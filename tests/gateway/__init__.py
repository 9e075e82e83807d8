"""The gateway before real nodes; needs nginx, and Prometheus for the metrics."""
