// Answers for each new connection of a pod whether NetworkPolicies allow it, by the code of kube-network-policies.
//
// The module's own program takes its account from a pod, and queues packets by nftables, whose queue expression not
// every kernel has. This one takes a kubeconfig and only answers: the rules that queue packets are the cluster's.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containerd/nri/pkg/api"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"
)

// Longer than a table's name may be, so that no kernel accepts the rules that the controller would install itself and
// nobody would remove after a kill.
var noTable = strings.Repeat("x", 1000)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "path of the kubeconfig")
	node := flag.String("node", "", "name of the node")
	queue := flag.Int("queue", 0, "number of the netfilter queue")
	flag.Parse()
	// The controller would ask a container runtime of the machine, which is not the cluster's, for addresses of pods.
	os.Setenv(api.PluginSocketEnvVar, "none")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *kubeconfig, *node, *queue); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig, node string, queue int) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	watched := informers.NewSharedInformerFactory(client, 0)
	controller, err := networkpolicy.NewController(
		client,
		watched.Networking().V1().NetworkPolicies(),
		watched.Core().V1().Namespaces(),
		watched.Core().V1().Pods(),
		nil, nil, nil, nil,
		networkpolicy.Config{QueueID: queue, NodeName: node, NFTableName: noTable},
	)
	if err != nil {
		return err
	}
	watched.Start(ctx.Done())
	return controller.Run(ctx)
}
