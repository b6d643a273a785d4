// What Argo CD makes of objects with the Lua of its settings: their health, the actions that it offers, and what each
// offered action would change. It runs the code that Argo CD's controller and API server run.
//
// Input, JSON on standard input: {"settings": the data of the ConfigMap argocd-cm, "objects": [...]}.
// Output, JSON: for each object {"health": {"status", "message"} or null, "actions": {name: the changed object}}.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/argoproj/argo-cd/gitops-engine/pkg/health"
	appv1 "github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"github.com/argoproj/argo-cd/v3/util/settings"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/fake"
)

const namespace = "argocd"

type input struct {
	Settings map[string]string            `json:"settings"`
	Objects  []*unstructured.Unstructured `json:"objects"`
}

type outcome struct {
	Health  *health.HealthStatus      `json:"health"`
	Actions map[string]map[string]any `json:"actions"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var given input
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	overrides, err := resourceOverrides(given.Settings)
	if err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	outcomes := make([]outcome, 0, len(given.Objects))
	for number, object := range given.Objects {
		found, err := evaluate(object, overrides)
		if err != nil {
			return fmt.Errorf("object %d: %w", number, err)
		}
		outcomes = append(outcomes, found)
	}
	return json.NewEncoder(os.Stdout).Encode(outcomes)
}

func resourceOverrides(data map[string]string) (map[string]appv1.ResourceOverride, error) {
	labels := map[string]string{"app.kubernetes.io/part-of": "argocd"}
	client := fake.NewClientset(
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "argocd-cm", Labels: labels}, Data: data},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "argocd-secret", Labels: labels}},
	)
	return settings.NewSettingsManager(context.Background(), client, namespace).GetResourceOverrides()
}

func evaluate(object *unstructured.Unstructured, overrides map[string]appv1.ResourceOverride) (outcome, error) {
	found := outcome{Actions: map[string]map[string]any{}}
	status, err := health.GetResourceHealth(object, lua.ResourceHealthOverrides(overrides))
	if err != nil {
		return found, err
	}
	found.Health = status
	vm := lua.VM{ResourceOverrides: overrides}
	scripts, err := vm.GetResourceActionDiscovery(object)
	if err != nil {
		return found, err
	}
	offered, err := vm.ExecuteResourceActionDiscovery(object, scripts)
	if err != nil {
		return found, err
	}
	for _, action := range offered {
		definition, err := vm.GetResourceAction(object, action.Name)
		if err != nil {
			return found, err
		}
		changed, err := vm.ExecuteResourceAction(object, definition.ActionLua, nil)
		if err != nil {
			return found, err
		}
		if len(changed) != 1 || changed[0].K8SOperation != lua.PatchOperation {
			return found, fmt.Errorf("action %s: expected one object to patch", action.Name)
		}
		found.Actions[action.Name] = changed[0].UnstructuredObj.Object
	}
	return found, nil
}
