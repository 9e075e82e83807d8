"""`make fuzz` and `make chaos`; tests/integration/test_faults.py runs both briefly."""
