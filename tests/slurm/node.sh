#!/bin/bash
# node.sh NAME DIRECTORY SHARED...: process 1 of a node, in namespaces that it has been started in. It gives the node a name,
# /tmp and /dev/shm of its own with the shared directories in them, and then buries orphans, as bash does.
set -euo pipefail
name=$1 directory=$2
shift 2
hostname "$name"
ip link set lo up
mkdir -p "$directory/tmp.$name"
mount -t tmpfs -o mode=1777 tmp "$directory/tmp.$name"
for shared in "$@"; do
    if [[ $shared == /tmp/* ]]; then
        mkdir -p "$directory/tmp.$name${shared#/tmp}"
        mount --rbind "$shared" "$directory/tmp.$name${shared#/tmp}"
    fi
done
mount --move "$directory/tmp.$name" /tmp
mount -t tmpfs -o size=4g,mode=1777 shm /dev/shm
# A view of /sys with this node's network. slurmd does not start where it hides the cgroups.
if [ -d /sys/fs/cgroup ]; then
    mkdir /dev/shm/cgroup
    mount --rbind /sys/fs/cgroup /dev/shm/cgroup
    mount -t sysfs sys /sys
    mount --move /dev/shm/cgroup /sys/fs/cgroup
    rmdir /dev/shm/cgroup
fi
mount --bind "$directory/hosts.$name" /etc/hosts
mount --bind "$directory/nsswitch.conf" /etc/nsswitch.conf
touch "$directory/$name.ready"
while :; do sleep 3600 & wait $!; done
