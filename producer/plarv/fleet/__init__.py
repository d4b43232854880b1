"""The SDK's side of a fleet: from the journal to Kafka, and from Kafka back to the run."""
