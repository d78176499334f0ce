"""The jobs: quantize, evaluate, sensitivities, convert, reproduce; one decoder layer at a time."""
