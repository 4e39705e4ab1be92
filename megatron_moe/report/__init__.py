"""What a run did, as one page that opens anywhere."""
