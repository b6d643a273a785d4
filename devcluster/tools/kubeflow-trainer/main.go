// Kubeflow Trainer's controllers with a limit of requests that can be chosen: its own program has no option for that,
// so that controller-runtime's default of 20 per second decides. Everything else is as its own program has it.
package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"log"
	"net/http"

	trainer "github.com/kubeflow/trainer/v2/pkg/apis/trainer/v1alpha1"
	"github.com/kubeflow/trainer/v2/pkg/controller"
	"github.com/kubeflow/trainer/v2/pkg/runtime"
	runtimecore "github.com/kubeflow/trainer/v2/pkg/runtime/core"
	"github.com/kubeflow/trainer/v2/pkg/util/cert"
	webhooks "github.com/kubeflow/trainer/v2/pkg/webhooks"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlpkg "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	jobset "sigs.k8s.io/jobset/api/jobset/v1alpha2"
	schedulerplugins "sigs.k8s.io/scheduler-plugins/apis/scheduling/v1alpha1"
)

func main() {
	requests := flag.Float64("kube-api-qps", 20, "Requests per second.")
	burst := flag.Int("kube-api-burst", 30, "Requests at once.")
	port := flag.Int("webhook-server-port", 9443, "Port of the webhooks.")
	probes := flag.String("health-probe-bind-address", ":8081", "Address of the probes.")
	flag.Parse()
	ctrl.SetLogger(zap.New())

	scheme := apiruntime.NewScheme()
	for _, add := range []func(*apiruntime.Scheme) error{
		clientgoscheme.AddToScheme, trainer.AddToScheme, jobset.AddToScheme, schedulerplugins.AddToScheme,
	} {
		utilruntime.Must(add(scheme))
	}
	config := ctrl.GetConfigOrDie()
	config.QPS, config.Burst = float32(*requests), *burst
	manager, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                 scheme,
		Client:                 client.Options{Cache: &client.CacheOptions{Unstructured: true}},
		Metrics:                metricsserver.Options{BindAddress: "0"},
		WebhookServer:          webhook.NewServer(webhook.Options{Port: *port, TLSOpts: []func(*tls.Config){onlyHTTP1}}),
		HealthProbeBindAddress: *probes,
	})
	stopOn(err)
	ready := make(chan struct{})
	stopOn(cert.ManageCerts(manager, cert.Config{
		WebhookServiceName:       "kubeflow-trainer-controller-manager",
		WebhookSecretName:        "kubeflow-trainer-webhook-cert",
		WebhookConfigurationName: "validator.trainer.kubeflow.org",
	}, ready))
	stopOn(manager.AddHealthzCheck("healthz", healthz.Ping))
	stopOn(manager.AddReadyzCheck("readyz", func(request *http.Request) error {
		select {
		case <-ready:
			return manager.GetWebhookServer().StartedChecker()(request)
		default:
			return errors.New("certificates are not ready")
		}
	}))
	context := ctrl.SetupSignalHandler()
	runtimes, err := runtimecore.New(context, manager.GetClient(), manager.GetFieldIndexer())
	stopOn(err)
	go setUp(manager, runtimes, ready)
	stopOn(manager.Start(context))
}

func setUp(manager ctrl.Manager, runtimes map[string]runtime.Runtime, ready <-chan struct{}) {
	<-ready
	_, err := controller.SetupControllers(manager, runtimes, ctrlpkg.Options{})
	stopOn(err)
	_, err = webhooks.Setup(manager, runtimes)
	stopOn(err)
}

func onlyHTTP1(config *tls.Config) {
	config.NextProtos = []string{"http/1.1"}
}

func stopOn(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
