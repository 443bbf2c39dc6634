# Starts name_server.py in the network of its own that "unshare --net --mount" has made, and lets
# the names of all programs in there be looked up with it. Arguments: an empty folder, the server's
# delay in milliseconds, and the Python to run it with.
set -e
ip link set lo up
echo "nameserver 127.0.0.53" >"$1/resolv.conf"
echo "hosts: files dns" >"$1/nsswitch.conf"
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
exec "$3" benchmarks/name_server.py "$2"
