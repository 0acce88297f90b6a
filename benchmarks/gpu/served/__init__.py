"""The stage of served engines: time to first token in real engines that share the device."""
