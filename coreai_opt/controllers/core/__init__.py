"""What all algorithms share: the interface, configurations, states, masks, export."""
