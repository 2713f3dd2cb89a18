"""What the kernel must be told and asked, without pyfuse3: mounts, INIT, notifications, backing files, processes."""
